"""What would fail is found before the first training, and named in one message.

Also of `comparison/method_checks.py`, `comparison/parameters.py`, of the dry run of `llava-steering compare`,
and of the example in docs/comparing.md.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from compared import LORA, MORES, content, test_of, write_file
from tiny_llava import TinyLlava
from typer.testing import CliRunner

from llava_steering_plugin.cli import app
from llava_steering_plugin.comparison.cells import plan_cells
from llava_steering_plugin.comparison.method_checks import flag_problems
from llava_steering_plugin.comparison.parameters import Counted, count_parameters
from llava_steering_plugin.comparison.preflight import check
from llava_steering_plugin.comparison.reading import comparison_from
from llava_steering_plugin.errors import ArgumentsError

PAGE = (Path(__file__).parents[2] / "docs" / "comparing.md").read_text()

pytestmark = pytest.mark.usefixtures("patched_llava")


@pytest.fixture(autouse=True)
def children_find_llava(patched_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training_runs import subprocess_environment

    monkeypatch.setenv("PYTHONPATH", subprocess_environment(patched_llava)["PYTHONPATH"])


def refused(data: dict[str, Any], folder: Path) -> str:
    with pytest.raises(ArgumentsError) as error:
        check(plan_cells(comparison_from(data, folder)), lambda text: None)
    return str(error.value)


def test_everything_that_would_fail_is_named_before_the_first_training(tiny: TinyLlava, tmp_path: Path) -> None:
    data = content(tiny, tmp_path)
    data["methods"] = {
        "misspelt": {"tuning_mode": "mores", "mores_rnak": 1},
        "too wide": {**MORES, "mores_rank": 65},
        "no number": {**LORA, "lora_r": "four", "lora_alpha": "eight", "lora_rate": 1},
        "two halves": {**MORES, "bf16": True, "fp16": True},
        "halves": {**LORA, "fp16": True},
        "packed": {**MORES, "bits": 4},
        "lost tokens": {**LORA, "mm_use_im_patch_token": True},
        "of no mode": {"mores_rank": 1},
        "sound": MORES,
    }
    data["defaults"]["version"] = "v3"
    data["answers"] |= {"conv_mode": "v33", "batch_size": 0, "load_4bit": "yes", "load_8bit": True}
    (tmp_path / "train.json").write_text(json.dumps([{"id": "a", "image": "gone.png", "conversations": []}]))
    (tmp_path / "asked.jsonl").write_text('{"question_id": 1, "image": "gone.png", "text": "?"}\n')
    (tmp_path / "of another split.jsonl").write_text('{"question_id": "x", "text": "?", "answer": "yes"}\n')
    task = data["tasks"]["shapes"]
    task["train"] = "train.json"
    task["validation"]["asked"] = test_of("asked.jsonl")
    task["validation"]["stranger"] = {**test_of("validation.jsonl"), "annotations": "of another split.jsonl"}
    task["test"] = {
        "mistyped": {**test_of("test.jsonl"), "benchmark": "exact_mach"},
        "judged": {**test_of("test.jsonl"), "benchmark": "mmvet"},
        "nowhere": {**test_of("test.jsonl"), "metric": "all.blue"},
    }
    message = refused(data, tmp_path)
    for said in (
        "methods.misspelt: unknown flag mores_rnak; did you mean 'mores_rank'?",
        "methods.too wide: --mores_rank",
        "methods.no number: unknown flag lora_rate; did you mean",
        "methods.no number: argument --lora_r: invalid int value: 'four'",
        "methods.no number: argument --lora_alpha: invalid int value: 'eight'",
        "methods.two halves: At most one of fp16 and bf16 can be True",
        "methods.halves: FP16 Mixed precision training",
        "methods.packed: --bits 4 needs a GPU",
        "methods.lost tokens: LLaVA does not save the tokens that --mm_use_im_patch_token adds",
        "methods.of no mode: --mores_rank belongs to a tuning mode and none is on",
        "--version v3 is no conversation template",
        "answers: batch_size is 0",
        "answers: load_4bit is 'yes'",
        "answers: --load-8bit needs a GPU",
        "v33",
        "tasks.shapes.train: ",
        "1 bad samples of 1",
        "tasks.shapes.validation.asked: some questions cannot be asked",
        "there is no image gone.png",
        "tasks.shapes.validation.stranger: ",
        "tasks.shapes.test.mistyped: ",
        "did you mean 'exact_match'?",
        "tasks.shapes.test.judged: ",
        "tasks.shapes.test.nowhere: exact_match has no number all.blue; `metric` takes one of: all.accuracy",
    ):
        assert said in message, said
    assert "methods.sound" not in message and "validation.seen" not in message
    everybody = ", ".join(name for name in data["methods"])
    assert message.count("--version v3") == 1 and f"methods.{everybody}: --version v3" in message


def test_questions_that_choose_the_learning_rate_are_no_test(tiny: TinyLlava, tmp_path: Path) -> None:
    data = content(tiny, tmp_path)
    lines = (tmp_path / "validation.jsonl").read_text().splitlines(keepends=True)
    own = (tmp_path / "test.jsonl").read_text()
    (tmp_path / "copied.jsonl").write_text(lines[2].replace('"question_id": ', '"question_id": "again", "was": ') + own)
    data["tasks"]["shapes"]["test"]["copied"] = test_of("copied.jsonl")
    data["tasks"]["shapes"]["test"]["again"] = test_of("validation.jsonl")
    message = refused(data, tmp_path)
    assert "validation.seen and tasks.shapes.test.again ask 8 of the same questions" in message
    assert "validation.seen and tasks.shapes.test.copied ask 1 of the same questions, such as 'again'" in message
    assert "test.unseen" not in message


def test_a_mistyped_base_is_refused_with_the_folder_that_was_meant(tiny: TinyLlava, tmp_path: Path) -> None:
    data = content(tiny, tmp_path, base="checkpoints/lava-7b")
    (tmp_path / "checkpoints" / "llava-7b").mkdir(parents=True)
    message = refused(data, tmp_path)
    assert message.count("there is no folder checkpoints/lava-7b") == 1
    assert f"base: {tmp_path} has a folder checkpoints/llava-7b" in message


def test_a_base_that_is_no_llava_is_refused(tiny: TinyLlava, tmp_path: Path) -> None:
    assert "is no LLaVA" in refused(content(tiny, tmp_path, base=str(tiny.llm)), tmp_path)


def test_methods_that_skip_bad_samples_do_not_mind_them(tiny: TinyLlava, tmp_path: Path) -> None:
    samples = json.loads(tiny.data.read_text())
    (tmp_path / "train.json").write_text(json.dumps([*samples, {**samples[0], "image": "gone.png"}]))
    data = content(tiny, tmp_path, methods={"MoReS": MORES})
    data["tasks"]["shapes"]["train"] = "train.json"
    assert "1 bad samples of 25" in refused(data, tmp_path)
    data["methods"] = {"MoReS": {**MORES, "skip_bad_samples": True}}
    check(plan_cells(comparison_from(data, tmp_path)), lambda text: None)


def test_parameters_are_those_that_a_training_has(tiny: TinyLlava, tmp_path: Path) -> None:
    """tests/training/test_measured.py counts the same in trainings."""
    data = content(tiny, tmp_path, methods={"MoReS": MORES, "LoRA": {**LORA, "freeze_mm_mlp_adapter": False}})
    comparison = comparison_from(data, tmp_path)
    counts = {cell.method.name: count_parameters(cell, comparison) for cell in plan_cells(comparison).cells}
    projector = 2 * (64 * 64 + 64)
    assert counts["MoReS"] == Counted(4 * (2 * 64 + 1), 0)
    assert counts["LoRA"] == Counted(4 * 4 * (4 * (64 + 64) + 3 * (64 + 128)), projector)
    assert counts["base (frozen)"] == Counted(0, 0)


def test_a_dry_run_prints_cells_and_parameters_and_writes_nothing(tiny: TinyLlava, tmp_path: Path) -> None:
    file = write_file(tmp_path, content(tiny, tmp_path))
    before = sorted(tmp_path.iterdir())
    result = CliRunner().invoke(app, ["compare", str(file), "--dry-run"])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert ["│", "shapes", "│", "MoReS", "│", "0.01", "│", "2", "│", "516", "│", "0", "│"] in lines
    assert "8 trainings, 9 validations, 5 tests of chosen cells" in result.output
    assert sorted(tmp_path.iterdir()) == before


def test_the_file_on_the_page_is_a_comparison_and_costs_what_the_page_says(tiny: TinyLlava, tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    data = yaml.safe_load(text)
    for path in ("data/vizwiz_train.json", "data/images/a.png", "data/held_out.jsonl", "data/vizwiz_val.jsonl"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("[]")
    (tmp_path / "vizwiz").mkdir()
    for name in ("train.json", "val.json"):
        (tmp_path / "vizwiz" / name).write_text("[]")
    data["base"], data["defaults"]["use_cpu"] = str(tiny.llava), True
    comparison = comparison_from(data, tmp_path)
    plan = plan_cells(comparison)
    firsts = {cell.method.name: cell for cell in plan.cells if not cell.method.frozen}
    assert [problem for cell in firsts.values() for problem in flag_problems(cell, comparison)] == []
    trainings = sum(not cell.method.frozen for cell in plan.cells)
    assert f"that is {trainings} trainings, {len(plan.cells)}\nvalidations and {3 * 3 + 1} tests" in PAGE


def test_the_page_lists_every_key_of_the_file_and_of_its_results() -> None:
    from dataclasses import fields

    from llava_steering_plugin.comparison.records import Record
    from llava_steering_plugin.comparison.schema import OF_A_TASK, OF_A_TEST, OF_ANSWERS, TOP

    named = set(re.findall(r"`(\w+)`", PAGE))
    assert named >= {*TOP, *OF_A_TASK, *OF_A_TEST, *OF_ANSWERS, *(field.name for field in fields(Record))}
