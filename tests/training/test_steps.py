"""A mode's statistics are led through a training: on every rank alike, also after a resume (`training/steps.py`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rank_runs import assert_equal, losses
from tiny_llava import TinyLlava
from torch import Tensor
from training_runs import train_flags, train_in_process

from llava_steering_plugin.modes.base import StepStatistics
from llava_steering_plugin.modes.mixlora_balance import BalanceOverSteps
from llava_steering_plugin.training.data.samples import HASHED
from llava_steering_plugin.training.saving import notes
from llava_steering_plugin.training.steps import StepEnd

# One row a pass, four passes a step; the third step begins in the middle of the training.
FLAGS: dict[str, object] = {
    "tuning_mode": "mixlora",
    "mixlora_factors": 8,
    "mixlora_rank": 2,
    "mixlora_targets": "q_proj,down_proj",
    "mixlora_balance": 1.0,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "learning_rate": 5e-3,
    "freeze_mm_mlp_adapter": True,
}


def train(tiny: TinyLlava, output: Path, **changed: object) -> None:
    torch.manual_seed(1234)
    train_in_process(train_flags(tiny, output, FLAGS | changed))


@pytest.fixture(scope="module")
def whole(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing disturbed, with checkpoint-2 and checkpoint-4; read-only."""
    output = tmp_path_factory.mktemp("steps") / "run"
    train(tiny, output)
    return output


def resumed(whole: Path, output: Path) -> Path:
    return Path(shutil.copytree(whole / "checkpoint-2", output / "checkpoint-2"))


def test_a_checkpoint_holds_the_shares_of_its_last_step(whole: Path) -> None:
    gathered = notes.gathered_in(whole / "checkpoint-2")
    assert gathered is not None and gathered.pop("together") == [], "no two of the linears get one tensor"
    assert len(gathered) == 4 * 2 * 2, "layers, linears, sides"
    for shares in gathered.values():
        assert sum(shares) == pytest.approx(1)
        # Four rows chose two factors each: the recomputations of gradient checkpointing are not counted again.
        assert all(8 * share == pytest.approx(round(8 * share)) for share in shares)
    assert gathered != {**notes.gathered_in(whole / "checkpoint-4"), "together": None}


def test_a_resumed_training_is_balanced_as_if_nothing_had_happened(
    tiny: TinyLlava, whole: Path, tmp_path: Path
) -> None:
    resumed(whole, tmp_path / "run")
    train(tiny, tmp_path / "run")
    assert_equal(whole, tmp_path / "run")
    assert losses(whole) == losses(tmp_path / "run")
    assert notes.gathered_in(tmp_path / "run" / "checkpoint-4") == notes.gathered_in(whole / "checkpoint-4")


def test_the_shares_in_the_checkpoint_matter_to_it(tiny: TinyLlava, whole: Path, tmp_path: Path) -> None:
    gathered = notes.gathered_in(resumed(whole, tmp_path / "run"))
    assert gathered is not None
    turned = {name: shares[::-1] for name, shares in gathered.items()}
    notes.write(tmp_path / "run" / "checkpoint-2", HASHED, turned)
    train(tiny, tmp_path / "run")
    with pytest.raises(AssertionError):
        assert_equal(whole, tmp_path / "run")


def test_a_checkpoint_of_an_earlier_version_goes_on_balancing_every_pass_on_its_own(
    tiny: TinyLlava, whole: Path, tmp_path: Path
) -> None:
    notes.write(resumed(whole, tmp_path / "run"), HASHED)
    train(tiny, tmp_path / "run")
    assert notes.gathered_in(tmp_path / "run" / "checkpoint-4") is None


class Recorder(StepStatistics):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def begin(self, passes: int) -> None:
        self.said.append(passes)

    def end_step(self, add_up: Callable[[Tensor], Tensor]) -> None:
        self.said.append(add_up(torch.ones(2)).tolist())

    def state(self) -> dict[str, Any]:
        return {"said": len(self.said)}

    def load(self, state: Mapping[str, Any]) -> None:
        self.said.append(dict(state))


@pytest.mark.parametrize(("accumulated", "ranks", "passes"), [(1, 1, 1), (4, 1, 4), (1, 2, 2), (4, 8, 32)])
def test_a_step_has_as_many_passes_as_all_ranks_accumulate(accumulated: int, ranks: int, passes: int) -> None:
    arguments = SimpleNamespace(gradient_accumulation_steps=accumulated, world_size=ranks, device=torch.device("cpu"))
    recorder = Recorder()
    led = StepEnd(recorder)
    led.begin(arguments)
    led.on_step_end(arguments, None, None)
    led.resume({"said": 5})
    assert recorder.said == [passes, [1.0, 1.0], {"said": 5}] and led.state() == {"said": 3}
    led.resume(None)
    led.on_step_end(arguments, None, None)
    assert recorder.said[3:] == [1] and led.state() is None


def test_statistics_are_told_of_the_accumulation_that_an_epoch_allows(
    tiny: TinyLlava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    begin = BalanceOverSteps.begin
    monkeypatch.setattr(BalanceOverSteps, "begin", lambda self, passes: (told.append(passes), begin(self, passes))[1])
    train(
        tiny,
        tmp_path / "run",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=8,
        max_steps=1,
        save_strategy="no",
    )
    assert told == [6]  # 24 samples


def test_a_mode_without_statistics_is_left_alone(tmp_path: Path) -> None:
    led = StepEnd(None)
    led.begin(None)
    led.on_step_end(None, None, None)
    led.resume(None)
    notes.write(tmp_path, HASHED, led.state())
    assert set(json.loads((tmp_path / notes.NOTES).read_text())) == {"sample_order", "sha256"}
