"""PEFT's methods under DeepSpeed on two ranks: ZeRO-2 trains and resumes them all, ZeRO-3 LoRA; others are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import torch
from baselines import TRAINED, flags_of
from deepspeed_files import zero
from rank_runs import resumed_from
from tiny_llava import TinyLlava
from training_runs import train_flags

from llava_steering_plugin.adapters.stored.folder import ADAPTER
from llava_steering_plugin.adapters.stored.locate import read
from llava_steering_plugin.planning.plan import plan

RUNS = [*((name, 2) for name in TRAINED), ("lora", 3)]
SHARED: dict[str, object] = {"use_cpu": None, "per_device_train_batch_size": 1}


@pytest.fixture(scope="module")
def runs(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("baselines-deepspeed")
    listed = []
    for name, stage in RUNS:
        flags = {**flags_of(name), **SHARED, "deepspeed": zero(folder, stage)}
        whole = folder / f"{name}-{stage}"
        listed.append(train_flags(tiny, whole, flags))
        listed.append(train_flags(tiny, resumed_from(whole, 2, folder / f"{name}-{stage}-resumed"), flags))
    ranks.run_on_ranks(listed, patched_llava, folder, timeout=600)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), RUNS)
def test_it_is_trained_saved_whole_and_resumed_bit_equal(runs: Path, name: str, stage: int) -> None:
    whole, resumed = (read(runs / f"{name}-{stage}{end}").section(ADAPTER) for end in ("", "-resumed"))
    start = read(runs / f"{name}-{stage}" / "checkpoint-2").section(ADAPTER)
    assert whole.keys() == resumed.keys() and all(value.numel() for value in whole.values())
    assert not [key for key, value in whole.items() if not torch.equal(value, resumed[key])]
    assert [key for key, value in whole.items() if not torch.equal(value, start[key])]


@pytest.mark.parametrize("name", ["dora", "ia3", "oft", "loha", "lokr"])
def test_zero_3_is_refused_where_a_layer_uses_parameters_outside_of_their_modules(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path, name: str
) -> None:
    flags = {**flags_of(name), **SHARED, "deepspeed": zero(tmp_path, 3)}
    [problem] = plan(train_flags(tiny, tmp_path / "run", flags)).problems
    assert f"is ZeRO-3, which cannot train peft ({name})" in problem
