"""`launch --measure` writes what a training costs, and the training does not notice (`training/measured.py`)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_llava import TinyLlava
from training_runs import FOUR_STEPS, LORA, train_flags, train_in_process

from llava_steering_plugin.training.measured import HOPELESS, MEASURE, losses_of

FROZEN: dict[str, object] = {"freeze_mm_mlp_adapter": True}


@contextmanager
def measuring(file: Path) -> Iterator[None]:
    token = MEASURE.set(file)
    try:
        yield
    finally:
        MEASURE.reset(token)


def measured(tiny: TinyLlava, tmp_path: Path, flags: dict[str, object]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is written, and the log of the training."""
    with measuring(tmp_path / "measured.json"):
        log = train_in_process(train_flags(tiny, tmp_path / "measured", flags))
    return json.loads((tmp_path / "measured.json").read_text()), log


def without_times(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: each for name, each in entry.items() if not name.startswith("train_")} for entry in log]


def test_a_training_with_a_mode_is_the_same_bit_by_bit_and_its_cost_is_written(tiny: TinyLlava, tmp_path: Path) -> None:
    found, log = measured(tiny, tmp_path, FOUR_STEPS | FROZEN)
    plain = train_in_process(train_flags(tiny, tmp_path / "plain", FOUR_STEPS | FROZEN))
    assert without_times(log) == without_times(plain)
    assert found["losses"] == losses_of(log) and len(found["losses"]) == 4
    assert (found["trained_parameters"], found["projector_parameters"]) == (4 * (2 * 64 * 2 + 2), 0)
    assert 0 < found["frozen_seconds"] and 0 < found["step_seconds"]
    assert found["peak_bytes"] > 50e6 and found["finished"] is True


def test_lora_and_the_projector_are_counted_apart(tiny: TinyLlava, tmp_path: Path) -> None:
    found, _ = measured(tiny, tmp_path, LORA | {"max_steps": 1})
    assert found["projector_parameters"] == 2 * (64 * 64 + 64)
    assert found["trained_parameters"] == 4 * 4 * (4 * (64 + 64) + 3 * (64 + 128))
    assert found["frozen_seconds"] > 0


def test_a_training_that_has_diverged_ends_early_and_says_where(tiny: TinyLlava, tmp_path: Path) -> None:
    flags = {"learning_rate": 1e30, "warmup_ratio": 0, "logging_nan_inf_filter": False, "max_steps": 3 * HOPELESS}
    found, _ = measured(tiny, tmp_path, flags | {"bf16": False})
    steps, losses = zip(*found["losses"], strict=True)
    assert math.isfinite(losses[0]) and losses[-HOPELESS:] == (None,) * HOPELESS
    assert steps[-1] < 3 * HOPELESS and found["finished"] is False


def test_a_process_that_goes_on_keeps_what_the_one_before_has_measured(tiny: TinyLlava, tmp_path: Path) -> None:
    """Of a training whose checkpoint is its end, no step is left to time."""
    before, _ = measured(tiny, tmp_path, FOUR_STEPS | FROZEN)
    after, _ = measured(tiny, tmp_path, FOUR_STEPS | FROZEN)
    assert after == {**before, "eval_loss": None, "peak_bytes": after["peak_bytes"]}


def test_nothing_is_measured_unless_it_is_asked_for(
    tiny: TinyLlava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_steering_plugin.training import measured as module

    monkeypatch.setattr(module, "Measured", lambda *arguments: pytest.fail("measured"))
    train_in_process(train_flags(tiny, tmp_path / "plain", {"max_steps": 1}))
