"""A training that finds checkpoints of another training in its --output_dir says so, and does not resume from them.

Covers `training/provenance.py`, with test_training.py.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from steered import contents
from tiny_llava import TinyLlava
from training_runs import train_flags, train_in_process, with_other_weights

from llava_steering_plugin.training.trainer import SteeringTrainerMixin

TRAINING: dict[str, object] = {
    "tuning_mode": "mores",
    "mores_rank": 2,
    "mores_tokens": "all",
    "freeze_mm_mlp_adapter": True,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 2,
}


@pytest.fixture(scope="module")
def run(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training that was stopped after its first step has left. Nothing here may change it."""
    folder = tmp_path_factory.mktemp("resume")
    train_in_process(train_flags(tiny, folder / "whole", TRAINING))
    shutil.copytree(folder / "whole" / "checkpoint-1", folder / "run" / "checkpoint-1")
    return folder / "run"


def refusal(tiny: TinyLlava, run: Path, changed: dict[str, object], capsys: pytest.CaptureFixture[str]) -> str:
    before = contents(run / "checkpoint-1")
    with pytest.raises(SystemExit) as stopped:
        train_in_process(train_flags(tiny, run, TRAINING | changed))
    assert stopped.value.code == 2
    assert contents(run / "checkpoint-1") == before
    assert [path.name for path in run.iterdir()] == ["checkpoint-1"]
    return capsys.readouterr().err


def test_other_settings_of_the_same_shapes_are_not_taken_up_in_silence(
    tiny: TinyLlava, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refusal(tiny, run, {"mores_tokens": "f4+l5", "mores_dropout": 0.1}, capsys)
    assert f"{run / 'checkpoint-1'} is of another training" in error
    assert "--mores_tokens is f4+l5 and was all" in error
    assert "--mores_dropout is 0.1 and was 0.0" in error
    assert error.count("\n  - ") == 2


def test_settings_of_other_shapes_and_another_mode_are_named_by_their_flags(
    tiny: TinyLlava, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--mores_rank is 3 and was 2" in refusal(tiny, run, {"mores_rank": 3}, capsys)
    other = {"tuning_mode": "mixlora", "mores_rank": None, "mores_tokens": None}
    assert "--tuning_mode is mixlora and was mores" in refusal(tiny, run, other, capsys)


def test_another_base_is_named(tiny: TinyLlava, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = with_other_weights(tiny.llava, tmp_path / "other")
    error = refusal(tiny, run, {"model_name_or_path": other}, capsys)
    assert f"--model_name_or_path is another base than {tiny.llava}" in error
    assert error.count("\n  - ") == 1


def test_a_base_that_has_moved_is_the_same_base(tiny: TinyLlava, run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny.llava, tmp_path / "moved")
    again = Path(shutil.copytree(run, tmp_path / "run"))
    train_in_process(train_flags(tiny, again, TRAINING | {"model_name_or_path": moved}))
    assert (again / "checkpoint-2").is_dir()


class OnDevices:
    """Stands for transformers' trainer, which can set random states only on the devices that they are of."""

    def __init__(self, error: Exception | None):
        self.error = error
        self.loaded: list[str] = []

    def _load_rng_state(self, checkpoint: str) -> None:
        self.loaded.append(checkpoint)
        if self.error is not None:
            raise self.error


class Resuming(SteeringTrainerMixin, OnDevices):
    def __init__(self, world_size: int, error: Exception | None = None):
        OnDevices.__init__(self, error)
        self._attachment: Any = object()
        self.args = SimpleNamespace(world_size=world_size)


def written_by(ranks: int, folder: Path) -> str:
    names = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    for name in names:
        (folder / name).touch()
    return str(folder)


@pytest.mark.parametrize(("before", "now"), [(2, 3), (4, 2), (1, 2), (2, 1)])
def test_random_states_of_another_number_of_ranks_are_left_alone(tmp_path: Path, before: int, now: int) -> None:
    trainer = Resuming(now, IndexError("device 2 of 2"))
    trainer._load_rng_state(written_by(before, tmp_path))
    assert not trainer.loaded


@pytest.mark.parametrize("error", [IndexError("tuple index out of range"), KeyError("cuda")])
def test_random_states_of_other_devices_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    checkpoint = written_by(2, tmp_path)
    trainer = Resuming(2, error)
    with caplog.at_level(logging.WARNING):
        trainer._load_rng_state(checkpoint)
    assert trainer.loaded == [checkpoint]
    assert f"{checkpoint} was written on other devices" in caplog.text and "dropout differs" in caplog.text
