"""The demo's results are shown in full (`experiments.demo`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from quick_runs import SCRIPTS
from rich.console import Console


def compared(*methods: tuple[str, int, float]) -> dict[str, Any]:
    """Return results.json of a comparison of these: name, trained parameters, percent of right answers."""
    kinds = ("colour", "shape", "yes/no")
    entries = [
        {
            "method": name,
            "frozen": not parameters,
            "rate": 0.01 if parameters else None,
            "seeds": [7],
            "done": [7],
            "costs": {"trained_parameters": parameters},
            "outcomes": {kind: {"score": {"mean": right, "deviation": None}} for kind in kinds},
        }
        for name, parameters, right in methods
    ]
    return {"tasks": [{"task": "shifted camera", "tests": dict.fromkeys(kinds, "exact_match"), "methods": entries}]}


def test_the_tables_and_the_plot_show_every_row(tmp_path: Path) -> None:
    from experiments import comparing
    from experiments.demo import report

    kinds = {"all": 0.5, "colour": 0.25, "shape": 0.5, "yes/no": 0.75}
    rows = [
        {"model": name, "camera": camera, **kinds}
        for name, camera in (("base", "clean"), ("base", "shifted"), ("MoReS rank 4, all", "shifted"))
    ]
    comparison = compared(("base (frozen)", 0, 25.0), ("MoReS rank 4, all", 4112, 97.7), ("LoRA r=8", 81920, 97.0))
    results = {"questions": 30, "rows": rows, "comparison": comparison}
    console = Console(width=160, record=True, quiet=False, file=(tmp_path / "shown").open("w"))
    console.print(report.table(results))
    console.print(comparing.table_of(comparison))
    shown = console.export_text()
    assert all(word in shown for word in ("clean", "75.0%", "4,112", "81,920", "97.7", "1 of 1"))
    console.print(report.attention({"attention_to_image": {"base": [0.07, 0.5], "lora-r-8": [0.06, 0.471]}}))
    assert "47%" in console.export_text()
    report.plot(results, tmp_path / "plot.png")
    assert min(Image.open(tmp_path / "plot.png").size) > 400


def test_every_tuning_of_the_demo_has_a_name_of_its_own_and_the_same_budget() -> None:
    from experiments.demo.settings import FULL, QUICK

    assert len({tuning.slug for tuning in FULL.tunings}) == len({tuning.name for tuning in FULL.tunings}) == 5
    assert {len(tuning.rates) for tuning in FULL.tunings} == {2}
    assert set(FULL.diagnosed) < {tuning.slug for tuning in FULL.tunings}
    assert [len(tuning.rates) for tuning in QUICK.tunings] == [1]


def answers(file: Path, *texts: str) -> None:
    """Write what upstream's evaluation writes, as far as it is read."""
    file.write_text(
        "".join(json.dumps({"question_id": place, "text": text}) + "\n" for place, text in enumerate(texts))
    )


def test_texts_of_both_engines_are_compared_question_by_question_and_model_by_model(tmp_path: Path) -> None:
    from experiments.demo.engines import different
    from experiments.stages import StageError

    answers(tmp_path / "base.jsonl", "red", "yes")
    answers(tmp_path / "mores.jsonl", "teal", "no")
    assert different({"base": ["red", "yes"], "mores": ["teal", "no"]}, tmp_path) == []
    assert different({"base": ["red", "yes"], "mores": ["red", "no"]}, tmp_path) == [
        "question 0 to mores: vLLM says 'red', upstream's evaluation 'teal'"
    ]
    with pytest.raises(StageError, match="mores: vLLM has answered 1 of 2 questions"):
        different({"base": ["red", "yes"], "mores": ["teal"]}, tmp_path)


def test_vllm_that_is_not_there_is_missed_before_anything_is_trained(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (tmp_path / "venv" / "pyvenv.cfg").write_text((Path(sys.prefix) / "pyvenv.cfg").read_text())
    (tmp_path / "venv" / "lib").symlink_to(Path(sys.prefix) / "lib")
    command = [str(python), str(SCRIPTS / "experiments" / "demo"), "--quick", "--vllm", "--output", str(tmp_path / "o")]
    done = subprocess.run(command, env=os.environ.copy(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert f"demo: --vllm needs {tmp_path}/venv-vllm/bin/python, which `scripts/setup.sh --vllm` makes" in done.stderr
    assert not list((tmp_path / "o" / "quick").iterdir())


def test_an_output_that_is_no_folder_is_one_message(tmp_path: Path) -> None:
    from experiments.program import runner_of

    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"demo: .*file/quick cannot be made .*give another place with --output"):
        with runner_of("demo", tmp_path / "file", True):
            pass
