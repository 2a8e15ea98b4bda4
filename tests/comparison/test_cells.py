"""A cell's id changes with all that its result depends on, and with nothing else; names never become paths.

Also of the command lines that `comparison/commands.py` makes of cells.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compared import MORES, content
from tiny_llava import TinyLlava

from llava_steering_plugin.comparison.cells import BASE, plan_cells
from llava_steering_plugin.comparison.commands import score, training_flags
from llava_steering_plugin.comparison.reading import comparison_from


def ids(data: dict[str, Any], folder: Path) -> set[str]:
    return {cell.id for cell in plan_cells(comparison_from(data, folder)).cells}


def test_every_method_has_a_cell_for_each_rate_and_seed_and_the_base_has_one(tiny: TinyLlava, tmp_path: Path) -> None:
    plan = plan_cells(comparison_from(content(tiny, tmp_path), tmp_path))
    base, *others = plan.cells
    assert (base.method.name, base.rate) == (BASE, 0.0)
    assert [(cell.seed, cell.method.name, cell.rate) for cell in others] == [
        (seed, method, rate) for seed in (1, 2) for method in ("MoReS", "LoRA") for rate in (0.001, 0.01)
    ]
    assert len({cell.id for cell in plan.cells}) == 9


def _steps(data: dict[str, Any]) -> None:
    data["methods"]["MoReS"] = {**MORES, "max_steps": 5}


def _more_rates(data: dict[str, Any]) -> None:
    data["learning_rates"] = [0.001, 0.01, 0.1]


def _other_test(data: dict[str, Any]) -> None:
    data["answers"]["max_new_tokens"] = 7


def _output(data: dict[str, Any]) -> None:
    data |= {"output": "elsewhere", "processes": 2}


@pytest.mark.parametrize(("change", "kept"), [(_steps, 5), (_more_rates, 9), (_other_test, 9), (_output, 9)])
def test_an_edited_file_keeps_the_cells_that_it_does_not_change(
    tiny: TinyLlava, tmp_path: Path, change: Callable[[dict[str, Any]], None], kept: int
) -> None:
    before = ids(content(tiny, tmp_path), tmp_path)
    data = content(tiny, tmp_path)
    change(data)
    assert len(before & ids(data, tmp_path)) == kept


def test_other_training_data_in_the_same_file_are_other_cells(tiny: TinyLlava, tmp_path: Path) -> None:
    data = content(tiny, tmp_path)
    (tmp_path / "train.json").write_text(tiny.data.read_text())
    data["tasks"]["shapes"]["train"] = "train.json"
    before = ids(data, tmp_path)
    (tmp_path / "train.json").write_text(json.dumps(json.loads(tiny.data.read_text())[:20]))
    (base,) = before & ids(data, tmp_path)
    assert "frozen" in base


def test_other_questions_are_another_evaluation_of_the_same_cells(tiny: TinyLlava, tmp_path: Path) -> None:
    comparison = comparison_from(content(tiny, tmp_path), tmp_path)
    before = plan_cells(comparison)
    (tmp_path / "test.jsonl").write_text((tmp_path / "validation.jsonl").read_text())
    after = plan_cells(comparison)
    assert [cell.id for cell in after.cells] == [cell.id for cell in before.cells]
    assert after.marks["shapes", "validation"] == before.marks["shapes", "validation"]
    assert after.marks["shapes", "test"] != before.marks["shapes", "test"]


def test_names_never_become_paths(tiny: TinyLlava, tmp_path: Path) -> None:
    data = content(tiny, tmp_path, methods={"../../etc: 100 %": MORES, "../..": MORES})
    data["tasks"] = {"/": data["tasks"]["shapes"], "~": data["tasks"]["shapes"]}
    found = ids(data, tmp_path)
    assert len(found) == 2 * (2 * 4 + 1), "names that look alike as files are still two"
    assert all(name not in (".", "..") and "/" not in name for name in found)


def test_the_command_line_of_a_cell_has_its_rate_seed_and_folder(tiny: TinyLlava, tmp_path: Path) -> None:
    comparison = comparison_from(content(tiny, tmp_path), tmp_path)
    cell = plan_cells(comparison).cells[2]
    words = training_flags(cell, comparison, comparison.output)
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert (given["--learning_rate"], given["--seed"], given["--mores_rank"]) == ("0.01", "1", "1")
    assert given["--output_dir"] == str(tmp_path / "output" / "cells" / cell.id / "model")
    assert given["--logging_nan_inf_filter"] == "False"


def test_only_pope_is_scored_with_its_questions(tiny: TinyLlava, tmp_path: Path) -> None:
    from dataclasses import replace

    (test,) = comparison_from(content(tiny, tmp_path), tmp_path).tasks[0].test
    files = [tmp_path / name for name in "abc"]
    assert "--questions" not in score(test, *files)
    (tmp_path / "llava.jsonl").write_text('{"question_id": 0, "text": "?"}\n')
    (tmp_path / "prepared.jsonl").write_text('{"question_id": "random/0", "text": "?"}\n')
    for name, given in (("llava", True), ("prepared", False)):
        words = score(replace(test, benchmark="pope", questions=tmp_path / f"{name}.jsonl"), *files)
        assert ("--questions" in words) == given
