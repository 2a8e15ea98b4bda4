"""Validation and diagnostics while training on two ranks: it does not notice, and the figures are those of one rank."""

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

from llava_steering_plugin.adapters.stored.locate import read

KINDS = ("ddp", "zero-3")
# Three samples: one of two ranks measures two, the other one of its own and one of the other's.
MEASURED: dict[str, object] = {"steering_diagnostics_steps": 3, "steering_diagnostics_samples": 3}
ROUTED: dict[str, object] = {
    **RESUMABLE,
    **{"tuning_mode": "mixlora", "mores_rank": None, "mores_tokens": None, "mores_dropout": None},
    **{"mixlora_factors": 8, "mixlora_rank": 2, "mixlora_noise": 0.1, "mixlora_balance": 1.0, "max_steps": 3},
}
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
    # Those of DeepSpeed last: what it leaves in the environment counts for all that follow.
    wanted = [
        train_flags(tiny, folder / "routed-plain", ROUTED),
        train_flags(tiny, folder / "routed-measured", {**ROUTED, **MEASURED}),
    ]
    for kind, engine in zip(KINDS, ({}, zero_3), strict=True):
        wanted += [
            train_flags(tiny, folder / f"{kind}-plain", {**RESUMABLE, **engine}),
            train_flags(tiny, folder / f"{kind}-validated", {**RESUMABLE, **engine, **validating(folder)}),
            train_flags(tiny, folder / f"{kind}-best", {**STRAYING, **engine, **validating(folder)}),
            train_flags(tiny, folder / f"{kind}-measured", {**RESUMABLE, **engine, **MEASURED}),
        ]
    ranks.run_on_ranks(wanted, patched_llava, folder)
    # The adapter that two ranks have trained, validated on one: nothing is left to train.
    again = {"evaluation_strategy": "no", "eval_steps": None, "do_eval": True}
    ended = resumed_from(folder / "ddp-validated", 6, folder / "one-rank")
    train_in_process(train_flags(tiny, ended, {**RESUMABLE, **validating(folder), **again}))
    # Before the first step, one rank has the adapter that two have.
    train_in_process(train_flags(tiny, folder / "routed-one-rank", {**ROUTED, **MEASURED, "max_steps": 1}))
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


def passes(run: Path) -> list[dict[str, Any]]:
    """What a training has written into diagnostics.jsonl, without its first line."""
    return [json.loads(line) for line in (run / "diagnostics.jsonl").read_text().splitlines()][1:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "routed"])
def test_a_training_ends_bit_equal_with_and_without_being_measured(runs: Path, kind: str) -> None:
    assert_equal(runs / f"{kind}-plain", runs / f"{kind}-measured")
    assert losses(runs / f"{kind}-plain") == losses(runs / f"{kind}-measured")
    expected = [0, 3] if kind == "routed" else [0, 3, 6]
    assert [line["step"] for line in passes(runs / f"{kind}-measured")] == expected
    logged = [entry["step"] for entry in history(runs / f"{kind}-measured") if "diagnostics/lmar/mean" in entry]
    assert logged == expected


@pytest.mark.slow
def test_what_is_measured_does_not_depend_on_the_ranks(runs: Path) -> None:
    assert passes(runs / "routed-measured")[0] == passes(runs / "routed-one-rank")[0]
    ddp, zero_3 = (passes(runs / f"{kind}-measured")[-1] for kind in KINDS)
    assert ddp["lmar"]["answers"] == zero_3["lmar"]["answers"] == 3
    # Under ZeRO-3 the vision tower computes in float32, and the numbers differ a little.
    assert zero_3["lmar"]["layers"] == pytest.approx(ddp["lmar"]["layers"], rel=1e-2)
    norms = [run["update_norms"]["vis"]["layers"] for run in (ddp, zero_3)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)
    assert min(norms[0][:-1]) > 0  # nothing reads the image tokens behind the last layer, so nothing is learned there


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
