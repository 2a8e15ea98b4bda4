"""`benchmarks memory`: the memory that a plan predicts is the memory that a training takes, to 20 %."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from quick_runs import SCRIPTS
from training_runs import subprocess_environment


@pytest.mark.slow
def test_the_peak_of_a_training_of_a_hundred_million_parameters_is_the_predicted_one(
    patched_llava: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            sys.executable,
            SCRIPTS / "benchmarks",
            "memory",
            "--only",
            "mores, projector trained, checkpointing off",
            "--json",
            "out.json",
        ],
        cwd=tmp_path,
        env=subprocess_environment(patched_llava),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (found,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert abs(found["predicted"] / found["measured"] - 1) < 0.2
    assert found["measured"] > 400 * 2**20  # 105 million weights in float32


def test_a_setting_that_fails_is_a_row_and_the_others_are_measured_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import memory

    first, second, third = settings = memory.SETTINGS[:3]
    written = tmp_path / "out.json"
    before: list[int] = []

    def compared(setting: memory.Setting, folder: Path) -> dict[str, object]:
        before.append(len(json.loads(written.read_text())["results"]) if written.exists() else 0)
        if setting == second:
            raise RuntimeError("CUDA out of memory")
        return {"setting": str(setting), "predicted": 2**20, "measured": 2**20, "error": 0.0}

    monkeypatch.setattr(memory, "SETTINGS", settings)
    monkeypatch.setattr(memory, "write_data", lambda folder: None)
    monkeypatch.setattr(memory, "compared", compared)
    status = memory.run(only="", json_file=written)

    assert status == 1
    assert before == [0, 1, 2], "each is written as soon as it is there"
    made = json.loads(written.read_text())
    assert [row["setting"] for row in made["results"]] == [str(first), str(second), str(third)]
    assert "CUDA out of memory" in made["results"][1]["failure"]
    assert made["failed"] == [str(second)]
    assert "CUDA out of memory" in capsys.readouterr().out
