"""A training finds checkpoints of another one in its --output_dir: it says so, and does not go on from them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from steered import contents
from tiny_llava import TinyLlava
from training_runs import train_flags, train_in_process, with_other_weights

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
