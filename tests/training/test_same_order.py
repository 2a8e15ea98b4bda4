"""LoRA under upstream sees its samples in another order than a mode at the same seed, and with `--same-order` in one.

Covers `SAME_ORDER` of `training/data/samples.py`, and what the experiments make of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_llava import TinyLlava
from training_runs import LORA, train_flags, train_in_process

from llava_steering_plugin.training.data.samples import SAME_ORDER

MORES: dict[str, object] = {"tuning_mode": "mores", "mores_tokens": "all"}
BATCH, STEPS = 8, 5  # three steps an epoch
FLAGS: dict[str, object] = {"per_device_train_batch_size": BATCH, "max_steps": STEPS}


@contextmanager
def same_order() -> Iterator[None]:
    token = SAME_ORDER.set(True)
    try:
        yield
    finally:
        SAME_ORDER.reset(token)


def seen(tiny: TinyLlava, output: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, object]) -> list[int]:
    """Train, and return the numbers of the samples in the order in which they were read."""
    from llava.train import train as upstream

    numbers: list[int] = []
    read = upstream.LazySupervisedDataset.__getitem__

    def noted(self: Any, number: int) -> Any:
        numbers.append(number)
        return read(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(upstream.LazySupervisedDataset, "__getitem__", noted)
        train_in_process(train_flags(tiny, output, FLAGS | flags))
    assert len(numbers) >= BATCH * STEPS
    return numbers[: BATCH * STEPS]


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped by length", "at random"])
def test_lora_with_same_order_sees_what_a_mode_sees_at_the_same_seed(
    tiny: TinyLlava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grouped: bool
) -> None:
    shuffled = {"group_by_modality_length": grouped, "seed": 3}
    of_mode = seen(tiny, tmp_path / "mores", monkeypatch, MORES | shuffled)
    with same_order():
        of_lora = seen(tiny, tmp_path / "lora-same", monkeypatch, LORA | shuffled)
    assert of_lora == of_mode
    epoch = of_mode[: 3 * BATCH]
    assert sorted(epoch) == list(range(24)) and of_mode[3 * BATCH :] != epoch[: 2 * BATCH]


@pytest.mark.parametrize("mode", ["mixlora", "peft", "projector"])
def test_all_modes_see_the_same_samples_at_the_same_seed(
    tiny: TinyLlava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    of_mores = seen(tiny, tmp_path / "mores", monkeypatch, MORES)
    assert seen(tiny, tmp_path / mode, monkeypatch, {"tuning_mode": mode}) == of_mores


def test_lora_without_it_has_the_order_of_upstream(
    tiny: TinyLlava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docs/training.md warns of. That it is upstream's to the bit: tests/upstream/test_unchanged.py."""
    of_mode = seen(tiny, tmp_path / "mores", monkeypatch, MORES)
    assert seen(tiny, tmp_path / "lora", monkeypatch, LORA) != of_mode


def test_the_base_of_the_experiments_is_compared_with_nothing_and_has_upstreams_order() -> None:
    from experiments import commands
    from experiments.demo.settings import FULL as DEMO

    folders = [Path(name) for name in ("output", "base", "projector", "train.json", "tower")]
    stage = commands.stage_2(DEMO.base, *folders)
    assert "--same-order" not in stage
    assert stage[stage.index("--seed") + 1] == stage[len(stage) - 1 - stage[::-1].index("--seed") + 1]
