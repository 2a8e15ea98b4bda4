"""Validation while training on two ranks: the training does not notice it, and its figures are those of one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ranks
from deepspeed_files import zero
from rank_runs import RESUMABLE, assert_equal, losses, resumed_from
from tiny_llava import TinyLlava
from training_runs import train_flags, train_in_process

from llava_steering_plugin.adapters.locate import read

KINDS = ("ddp", "zero-3")
# A rate that is far too high: the second evaluation is worse than the first.
STRAYING: dict[str, object] = {
    **RESUMABLE,
    "max_steps": 2,
    "save_steps": 1,
    "learning_rate": 10,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
    "load_best_model_at_end": True,
}


def validating(folder: Path, **overrides: object) -> dict[str, object]:
    return {
        "eval_data_path": folder / "held-out.json",
        "evaluation_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 3,
        **overrides,
    }


@pytest.fixture(scope="module")
def runs(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs on two ranks, without and with validation, and `one-rank`, a validation in this process."""
    folder = tmp_path_factory.mktemp("validated")
    samples = json.loads(tiny.data.read_text())
    # Seven: two ranks have shares of four, one of them with a sample of the other's. One sample has no image.
    (folder / "held-out.json").write_text(json.dumps(samples[:6] + samples[10:11]))
    zero_3 = {"use_cpu": None, "deepspeed": zero(folder, 3)}
    wanted = []
    for kind, engine in zip(KINDS, ({}, zero_3), strict=True):
        wanted += [
            train_flags(tiny, folder / f"{kind}-plain", {**RESUMABLE, **engine}),
            train_flags(tiny, folder / f"{kind}-validated", {**RESUMABLE, **engine, **validating(folder)}),
            train_flags(tiny, folder / f"{kind}-best", {**STRAYING, **engine, **validating(folder)}),
        ]
    ranks.run_on_ranks(wanted, patched_llava, folder)
    # The adapter that two ranks have trained, validated on one: nothing is left to train.
    again = {"evaluation_strategy": "no", "eval_steps": None, "do_eval": True}
    ended = resumed_from(folder / "ddp-validated", 6, folder / "one-rank")
    train_in_process(train_flags(tiny, ended, {**RESUMABLE, **validating(folder), **again}))
    return folder


def history(run: Path) -> list[dict[str, Any]]:
    return list(json.loads((run / "trainer_state.json").read_text())["log_history"])


def evaluations(run: Path) -> dict[int, float]:
    return {entry["step"]: entry["eval_loss"] for entry in history(run) if "eval_loss" in entry}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_ends_bit_equal_with_and_without_validation(runs: Path, kind: str) -> None:
    assert_equal(runs / f"{kind}-plain", runs / f"{kind}-validated")
    assert losses(runs / f"{kind}-plain") == losses(runs / f"{kind}-validated")
    assert list(evaluations(runs / f"{kind}-validated")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_every_sample_counts_once_however_many_ranks_there_are(runs: Path) -> None:
    by_two, by_one = [entry["eval_loss"] for entry in history(runs / "one-rank") if "eval_loss" in entry][-2:]
    two = evaluations(runs / "ddp-validated")
    assert by_two == two[6] and by_one == pytest.approx(by_two, rel=1e-6)
    # Under ZeRO-3 the vision tower computes in float32, and the losses differ by a few 1e-4.
    assert evaluations(runs / "zero-3-validated") == pytest.approx(two, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_the_best_checkpoint_on_every_kind_of_ranks(runs: Path, kind: str) -> None:
    run = runs / f"{kind}-best"
    evaluated = evaluations(run)
    best = min(evaluated, key=lambda step: evaluated[step])
    assert best == 1
    stored, result = read(run / f"checkpoint-{best}"), read(run)
    assert stored.tensors.keys() == result.tensors.keys()
    assert all(value.equal(result.tensors[name]) for name, value in stored.tensors.items())
    assert any(not value.equal(result.tensors[name]) for name, value in read(run / "checkpoint-2").tensors.items())
