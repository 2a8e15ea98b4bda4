"""Quantised backbones under DeepSpeed's ZeRO-2, on two ranks on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
from deepspeed_files import zero
from rank_runs import MIXLORA, MORES, assert_equal, losses, resumed_from
from tiny_llava import TinyLlava
from training_runs import train_flags

from llava_steering_plugin.adapters.stored.folder import EXTRA
from llava_steering_plugin.adapters.stored.locate import read

# More than the ten steps after which a parameter without a gradient would have stopped the training.
COMMON = {"use_cpu": None, "max_steps": 11, "per_device_train_batch_size": 2}
SAVED = {"save_strategy": "steps", "save_steps": 6}
WHOLE = "mores-4-bf16"
RUNS = {
    WHOLE: {**MORES, "bits": 4, **SAVED},
    "mores-8-fp32": {**MORES, "bits": 8, "bf16": False},
    "mixlora-4-bf16": {**MIXLORA, "bits": 4},
}


@pytest.fixture(scope="module")
def runs(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of quantised runs under torchrun, on two ranks."""
    folder = tmp_path_factory.mktemp("quantised-deepspeed")
    common = {**COMMON, "deepspeed": zero(folder, 2)}
    flags = [train_flags(tiny, folder / name, {**common, **overrides}) for name, overrides in RUNS.items()]
    resumed = resumed_from(folder / WHOLE, 6, folder / "resumed")
    flags.append(train_flags(tiny, resumed, {**common, **RUNS[WHOLE]}))
    # Compiling DeepSpeed's operations for the processor takes minutes, once for all runs on this machine.
    ranks.run_on_ranks(flags, patched_llava, folder, timeout=600)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_quantised_backbone_trains_under_zero_2_and_its_adapter_is_saved(runs: Path, name: str) -> None:
    assert len(losses(runs / name)) == COMMON["max_steps"]
    stored = read(runs / name)
    assert stored.config.trained_on["bits"] == RUNS[name]["bits"]
    assert stored.section(EXTRA), "the projector is trained too"
    assert all(bool(value.isfinite().all()) for value in stored.tensors.values())
    # Zero at first, in either mode.
    moved = [value for key, value in stored.tensors.items() if key.endswith(("routed_b", "steer_shift"))]
    assert any(bool(value.any()) for value in moved)


@pytest.mark.slow
def test_a_quantised_training_resumed_under_zero_2_ends_bit_equal(runs: Path) -> None:
    assert len(losses(runs / "resumed")) == COMMON["max_steps"]
    assert_equal(runs / WHOLE, runs / "resumed")
