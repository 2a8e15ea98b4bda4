"""The file of a comparison is read whole, and everything that is wrong with it is named at once.

Also of `comparison/schema.py`, which says what it may hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compared import MORES, content, write_file
from tiny_llava import TinyLlava

from llava_steering_plugin.comparison.reading import comparison_from, read_comparison
from llava_steering_plugin.errors import ArgumentsError


def refused(data: Any, folder: Path) -> str:
    with pytest.raises(ArgumentsError) as error:
        comparison_from(data, folder)
    return str(error.value)


def test_a_file_becomes_a_comparison_with_paths_from_its_own_folder(tiny: TinyLlava, tmp_path: Path) -> None:
    data = content(tiny, tmp_path)
    data["methods"] = {
        "base": {"frozen": True},
        "MoReS": {**MORES, "learning_rates": [0.02, 0.2], "peft_config": {"r": 2}, "model_max_length": None},
        "LoRA": {"lora_enable": True},
    }
    found = read_comparison(write_file(tmp_path, data))
    base, mores, lora = found.methods
    assert base.frozen and base.rates == () and base.flags == {}
    assert mores.rates == (0.02, 0.2) and lora.rates == (0.001, 0.01), "1e-3 is text in YAML, and a number here"
    assert mores.has_mode and not lora.has_mode
    assert mores.flags["peft_config"] == '{"r": 2}'
    assert "model_max_length" not in mores.flags and lora.flags["model_max_length"] == 512
    assert found.output == tmp_path / "output"
    (task,) = found.tasks
    assert task.validation[0].questions == tmp_path / "validation.jsonl"
    assert task.test[0].image_folder == tiny.images


def test_everything_that_is_wrong_is_named_in_one_message(tiny: TinyLlava, tmp_path: Path) -> None:
    data = content(tiny, tmp_path)
    data |= {"sedes": [1], "seeds": [1, 1, -3], "learning_rates": [0, "fast", 0.1, 0.1], "processes": 0}
    data["methods"]["MoReS"] = {"learning_rate": 0.1, "--mores_rank": 2}
    data["methods"]["LoRA"] = {"deepspeed": "zero3.json", "vision_tower": "openai/clip"}
    data["tasks"]["shapes"]["train"] = "nowhere.json"
    data["tasks"]["shapes"]["validation"] = {}
    message = refused(data, tmp_path)
    for said in (
        "unknown key sedes; did you mean 'seeds'?",
        "seeds holds 1 twice",
        "seeds holds -3",
        "learning_rates holds 0;",
        "learning_rates holds 'fast'",
        "learning_rates holds 0.1 twice",
        "processes is 0",
        "methods.MoReS.learning_rate is set by the comparison; say it with learning_rates",
        f"methods.LoRA.deepspeed: there is no file {tmp_path / 'zero3.json'}",
        "methods.MoReS.--mores_rank: a flag is given without dashes",
        f"tasks.shapes.train: there is no file {tmp_path / 'nowhere.json'}",
        "tasks.shapes.validation holds at least one, by name: learning rates are chosen by it",
    ):
        assert said in message


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("base", None, "base is missing"),
        ("methods", {}, "methods holds at least one"),
        ("methods", {"base": {"frozen": True}}, "none is trained"),
        ("methods", {"base": {"frozen": True, "mores_rank": 1}, "M": MORES}, "takes no flags"),
        ("methods", {"a": {"frozen": True}, "b": {"frozen": True}, "M": MORES}, "a, b are all the base itself"),
        ("methods", {"M": MORES, "N": {**MORES, "learning_rates": [1]}}, "here M 2, N 1"),
        ("methods", {"M": MORES, 3: MORES}, "3 is no name"),
        ("methods", {"M": [1]}, "methods.M is [1]"),
        ("seeds", [], "seeds is empty"),
        ("seeds", [True], "seeds holds True"),
        ("gpus", [0, 0], "gpus is [0, 0]"),
        ("answers", {"batch": 3}, "unknown key answers.batch; did you mean 'batch_size'?"),
        ("launcher", {"a": 1}, "launcher is"),
        ("tasks", {"t": 3}, "tasks.t is 3"),
        ("reference", "MoReSS", "reference is 'MoReSS'; did you mean 'MoReS'?"),
    ],
)
def test_a_wrong_part_is_named(tiny: TinyLlava, tmp_path: Path, place: str, value: Any, said: str) -> None:
    assert said in refused(content(tiny, tmp_path, **{place: value}), tmp_path)


def test_a_task_without_validation_is_told_why_it_needs_one(tiny: TinyLlava, tmp_path: Path) -> None:
    data = content(tiny, tmp_path)
    del data["tasks"]["shapes"]["validation"]
    assert "tasks.shapes.validation is missing: learning rates are chosen by it" in refused(data, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seeds: [1]\nseeds: [2]\n", "'seeds' in line 2 is given twice"),
        ("methods: {a: {mores_rank: 1, mores_rank: 2}}", "'mores_rank' in line 1 is given twice"),
        ("a: [", "is no YAML"),
        ("just words", "it holds 'just words', where a comparison has base, output, methods,"),
        ("!!python/object/apply:os.system ['true']", "is no YAML"),
        ("- a", "it holds ['a'], where a comparison has base"),
        ("# nothing yet", "it is empty, where a comparison has base, output, methods, learning_rates, seeds, tasks"),
    ],
)
def test_a_file_that_is_no_comparison_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ArgumentsError) as error:
        read_comparison(tmp_path / "c.yaml")
    assert said in str(error.value) and "c.yaml" in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentsError, match=r"nowhere\.yaml cannot be read"):
        read_comparison(tmp_path / "nowhere.yaml")
