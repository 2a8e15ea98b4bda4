"""A training with a mode touches nothing in its output folder that is not its own.

Covers `training/saving/output_folder.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rank_runs import assert_equal
from tiny_llava import TinyLlava
from training_runs import LORA, train_flags, train_in_process

from llava_steering_plugin.errors import CheckpointError
from llava_steering_plugin.training.saving import checkpoints
from llava_steering_plugin.training.saving.output_folder import free_name, is_foreign, output_problems

SAVED: dict[str, object] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
MORES: dict[str, object] = {**SAVED, "tuning_mode": "mores", "mores_rank": 2, "mores_tokens": "all"}
MIXLORA: dict[str, object] = {**SAVED, "tuning_mode": "mixlora", "mixlora_factors": 4, "mixlora_rank": 2}
KINDS: dict[str, dict[str, object]] = {"lora": {**SAVED, **LORA}, "full": SAVED, "mixlora": MIXLORA}


@pytest.fixture(scope="module")
def others(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folders of other trainings; read-only."""
    folder = tmp_path_factory.mktemp("others")
    for kind, flags in KINDS.items():
        train_in_process(train_flags(tiny, folder / kind, flags))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(tiny: TinyLlava, output: Path, capsys: pytest.CaptureFixture[str], **overrides: object) -> str:
    """Start a training that has to be refused, and return what it says."""
    with pytest.raises(SystemExit) as stopped:
        train_in_process(train_flags(tiny, output, {**MORES, **overrides}))
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert "'loss'" not in captured.out and "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_checkpoint_of_another_kind_of_training_is_left_alone(
    tiny: TinyLlava, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(others / kind / "checkpoint-2", run / "checkpoint-2")
    (run / "damaged-checkpoint-2").mkdir()
    (run / "damaged-checkpoint-2" / "notes").write_text("of last week")
    before = contents(run)
    error = refused(tiny, run, capsys, model_name_or_path=tiny.llava)
    assert "checkpoint-2" in error and str(run) in error and "another --output_dir" in error
    assert contents(run) == before


def test_neither_older_nor_newer_ones_are_deleted_by_a_limit(
    tiny: TinyLlava, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for step in (1, 9):
        shutil.copytree(others / "lora" / "checkpoint-2", run / f"checkpoint-{step}")
    before = contents(run)
    error = refused(tiny, run, capsys, save_total_limit=1)
    assert "holds checkpoint-1," in error and "holds checkpoint-9," in error
    # Also where they come while the training runs.
    shutil.copytree(others / "mixlora" / "checkpoint-2", run / "checkpoint-2")
    checkpoints.rotate(run, 2, 1)
    with pytest.raises(CheckpointError, match="checkpoint-9 is of another kind of training"):
        checkpoints.remove_step(run, 9)
    assert checkpoints.newest_complete(run) == 2
    shutil.rmtree(run / "checkpoint-2")
    assert contents(run) == before


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_result_of_another_kind_of_training_is_not_overwritten(
    tiny: TinyLlava, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    run = shutil.copytree(others / kind, tmp_path / "run")
    shutil.rmtree(run / "checkpoint-2")
    before = contents(run)
    assert f"--output_dir {run} holds another model, or an adapter of PEFT's" in refused(tiny, run, capsys)
    assert contents(run) == before


def test_half_a_checkpoint_of_others_is_not_deleted_and_half_of_ours_is(others: Path, tmp_path: Path) -> None:
    shutil.copytree(others / "full" / "checkpoint-2", tmp_path / "tmp-checkpoint-2")
    (problem,) = output_problems(tmp_path)
    assert "holds tmp-checkpoint-2, half a checkpoint" in problem
    with pytest.raises(CheckpointError, match="half a checkpoint"):
        checkpoints.prepare_output(tmp_path)
    shutil.rmtree(tmp_path / "tmp-checkpoint-2")
    shutil.copytree(others / "mixlora" / "checkpoint-2", tmp_path / "tmp-checkpoint-2")
    (tmp_path / "tmp-checkpoint-best").mkdir()
    checkpoints.prepare_output(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tmp-checkpoint-best"]


def test_an_earlier_damaged_folder_is_kept(tiny: TinyLlava, others: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "damaged-checkpoint-2").mkdir(parents=True)
    (run / "damaged-checkpoint-2" / "notes").write_text("of last week")
    train_in_process(train_flags(tiny, tmp_path / "whole", MORES))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", run / "checkpoint-2")
    (run / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    train_in_process(train_flags(tiny, run, MORES))
    assert (run / "damaged-checkpoint-2" / "notes").read_text() == "of last week"
    assert (run / "damaged-checkpoint-2.2" / "optimizer.pt").read_bytes() == b""
    assert_equal(tmp_path / "whole", run)
    assert free_name(run / "damaged-checkpoint-2").name == "damaged-checkpoint-2.3"


def test_a_folder_with_nothing_in_it_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    assert not is_foreign(tmp_path / "checkpoint-3") and output_problems(tmp_path) == []
    (tmp_path / "checkpoint-3" / "weights.pt").write_bytes(b"of some other trainer")
    assert is_foreign(tmp_path / "checkpoint-3") and len(output_problems(tmp_path)) == 1
    assert output_problems(tmp_path / "not-there") == []
