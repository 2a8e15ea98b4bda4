"""A training goes on, begins again or is found done by what lies in its cell's folder; half of one never counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compared import content
from tiny_llava import TinyLlava

from llava_steering_plugin.comparison.cells import Cell, plan_cells
from llava_steering_plugin.comparison.processes import Command
from llava_steering_plugin.comparison.reading import comparison_from
from llava_steering_plugin.comparison.records import DIVERGED, DONE, FAILED
from llava_steering_plugin.comparison.schema import Comparison
from llava_steering_plugin.comparison.training import TRAINED, Trained, find_trained, train


@pytest.fixture
def comparison(tiny: TinyLlava, tmp_path: Path) -> Comparison:
    return comparison_from(content(tiny, tmp_path), tmp_path)


def cell_of(comparison: Comparison, method: str) -> Cell:
    return next(cell for cell in plan_cells(comparison).cells if cell.method.name == method)


def ended(comparison: Comparison, cell: Cell, status: int, **measured: Any) -> Trained:
    """What becomes of a training that leaves a model, what it has measured, and a status."""
    steps = train(cell, comparison, comparison.output, {})
    command = next(steps)
    folder = cell.folder(comparison.output)
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "adapter_model.safetensors").write_bytes(b"12345")
    (folder / "model" / "training_args.bin").write_bytes(b"not loaded")
    (folder / "measured.json").write_text(json.dumps(measured))
    command.log.write_text("RuntimeError: out of memory\n")
    with pytest.raises(StopIteration) as stopped:
        steps.send(status)
    found: Trained = stopped.value.value
    return found


def test_a_training_that_is_done_is_found_again_and_not_run(comparison: Comparison) -> None:
    cell = cell_of(comparison, "MoReS")
    found = ended(comparison, cell, 0, losses=[[1, 2.0]], trained_parameters=516)
    assert found == Trained(DONE, None, [[1, 2.0]], {"trained_parameters": 516}, 5)
    with pytest.raises(StopIteration) as stopped:
        next(train(cell, comparison, comparison.output, {}))
    assert stopped.value.value == found


def test_a_training_that_failed_says_why_and_is_run_again(comparison: Comparison) -> None:
    cell = cell_of(comparison, "MoReS")
    found = ended(comparison, cell, 1, losses=[[1, 2.0]])
    assert found.status == FAILED and "status 1:\n  RuntimeError: out of memory" in (found.error or "")
    assert find_trained(cell.folder(comparison.output)) is None
    assert isinstance(next(train(cell, comparison, comparison.output, {})), Command)


@pytest.mark.parametrize("status", [0, 1], ids=["whole", "could not be saved"])
def test_a_training_that_diverged_is_not_run_again(comparison: Comparison, status: int) -> None:
    cell = cell_of(comparison, "LoRA")
    found = ended(comparison, cell, status, losses=[[1, 2.0], [2, None], [3, None]])
    assert (found.status, found.error) == (DIVERGED, "diverged: the loss is no finite number from step 2 on")
    assert find_trained(cell.folder(comparison.output)) == found


def test_one_loss_that_is_no_number_is_a_batch_without_targets(comparison: Comparison) -> None:
    assert ended(comparison, cell_of(comparison, "MoReS"), 0, losses=[[1, None], [2, 2.0]]).status == DONE


@pytest.mark.parametrize(("method", "goes_on"), [("MoReS", True), ("LoRA", False)])
def test_only_a_training_with_a_mode_goes_on_from_its_checkpoint(
    comparison: Comparison, method: str, goes_on: bool
) -> None:
    cell = cell_of(comparison, method)
    folder = cell.folder(comparison.output)
    for path in ("model/checkpoint-2/weights", "measured.json", "test-0123456789/record.json"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("{}")
    next(train(cell, comparison, comparison.output, {}))
    assert (folder / "model" / "checkpoint-2" / "weights").exists() == goes_on
    assert (folder / "measured.json").exists() == goes_on
    assert not (folder / "test-0123456789").exists(), "answers of a model that was there before"


def test_a_model_that_was_deleted_is_trained_again(comparison: Comparison) -> None:
    cell = cell_of(comparison, "MoReS")
    ended(comparison, cell, 0)
    folder = cell.folder(comparison.output)
    (folder / "model").rename(folder / "elsewhere")
    assert find_trained(folder) is None
    (folder / TRAINED).write_text('{"status": "do')
    assert find_trained(folder) is None


def test_each_process_sees_the_gpu_that_it_was_given(comparison: Comparison) -> None:
    cell = cell_of(comparison, "MoReS")
    command = next(train(cell, comparison, comparison.output, {"CUDA_VISIBLE_DEVICES": "3"}))
    assert command.env == {"CUDA_VISIBLE_DEVICES": "3"} and command.fork
