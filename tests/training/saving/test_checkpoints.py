"""Checkpoints that are damaged, that cannot be written, or that are the end of a training; and which are deleted.

Covers `training/saving/checkpoints.py` and `training/saving/integrity.py`.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from disks import file_system, largest_file, mount
from rank_runs import assert_equal, losses
from steered import contents
from tiny_llava import TinyLlava
from training_runs import FOUR_STEPS, train_flags, train_in_process
from transformers import TrainingArguments

from llava_steering_plugin.adapters.stored.folder import WEIGHTS
from llava_steering_plugin.errors import CheckpointError
from llava_steering_plugin.training.saving import checkpoints, integrity
from llava_steering_plugin.training.saving.notes import NOTES


@pytest.fixture(scope="module")
def whole(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing disturbed, with checkpoint-2 and checkpoint-4; read-only."""
    output = tmp_path_factory.mktemp("whole") / "run"
    train_in_process(train_flags(tiny, output, FOUR_STEPS))
    return output


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """The same training, killed behind its last checkpoint: the adapter itself was not saved yet."""
    output = tmp_path / "run"
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(whole / name, output / name)
    return output


def again(tiny: TinyLlava, output: Path, **overrides: object) -> None:
    torch.manual_seed(1234)
    train_in_process(train_flags(tiny, output, {**FOUR_STEPS, **overrides}))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    """One bit in the middle, as a disk may do it."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = (
    [
        (name, damage)
        for name in (WEIGHTS, integrity.STATE, "optimizer.pt", "scheduler.pt", "rng_state.pth")
        for damage in (Path.unlink, cut, empty)
    ]
    + [(NOTES, cut), (NOTES, empty), (NOTES, flip)]
    + [("optimizer.pt", flip), ("rng_state.pth", flip)]
)


@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=lambda part: getattr(part, "__name__", part))
def test_a_damaged_checkpoint_is_never_taken_for_whole_and_the_one_before_is_found(
    run: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    assert checkpoints.newest_complete(run) == 4
    damage(run / "checkpoint-4" / name)
    assert checkpoints.newest_complete(run) == 2
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-2", "damaged-checkpoint-4"]
    assert name in caplog.text


def test_behind_a_damaged_checkpoint_the_training_ends_bit_equal(tiny: TinyLlava, whole: Path, run: Path) -> None:
    cut(run / "checkpoint-4" / "optimizer.pt")
    again(tiny, run)
    assert_equal(whole, run)
    assert losses(whole) == losses(run)
    assert integrity.checkpoint_problems(run / "checkpoint-4") == []


def test_a_damaged_checkpoint_that_cannot_be_set_aside_is_one_clear_error(
    tiny: TinyLlava, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(run / "checkpoint-4" / "optimizer.pt")
    monkeypatch.setattr(checkpoints, "free_name", lambda path: path.parent / "no-such-folder" / path.name)
    with pytest.raises(SystemExit) as stopped:
        again(tiny, run)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"{run / 'checkpoint-4'} is not complete, and cannot be renamed to damaged-checkpoint-4" in error
    assert "optimizer.pt is cut short" in error and "Traceback" not in error


def test_without_any_whole_checkpoint_the_training_starts_from_the_beginning(
    tiny: TinyLlava, whole: Path, run: Path
) -> None:
    for folder in run.glob("checkpoint-*"):
        empty(folder / "rng_state.pth")
    # What killed processes leave: half a save, half an adapter, and half of other files.
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    shutil.copytree(whole / "checkpoint-2", run / "tmp-checkpoint-2")
    for process in (gone.pid, os.getppid()):
        (run / f".{WEIGHTS}.{process}.partial").write_bytes(b"half")
    for name in ("skipped_samples.json", "diagnostics.jsonl"):
        (run / f".{name}.{gone.pid}.partial").write_bytes(b"half")
    again(tiny, run)
    assert_equal(whole, run)
    assert not list(run.glob("tmp-*"))
    assert [path.name for path in run.glob(".*")] == [f".{WEIGHTS}.{os.getppid()}.partial"], "it still runs"


@pytest.mark.parametrize("length", [{}, {"max_steps": None, "num_train_epochs": 0.66}], ids=["steps", "epochs"])
def test_a_training_killed_behind_its_last_checkpoint_is_not_trained_one_step_too_far(
    tiny: TinyLlava, whole: Path, run: Path, length: dict[str, object]
) -> None:
    again(tiny, run, **length)
    assert_equal(whole, run)
    assert len(losses(run)) == 4


def test_what_is_deleted_is_never_what_a_resume_needs(whole: Path, tmp_path: Path) -> None:
    def names() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    for step, source in ((2, 2), (4, 4), (6, 4), (8, 4)):
        folder = shutil.copytree(whole / f"checkpoint-{source}", tmp_path / f"checkpoint-{step}")
        state = (folder / integrity.STATE).read_text()
        (folder / integrity.STATE).write_text(state.replace(f'"global_step": {source}', f'"global_step": {step}'))
    # The clock says otherwise, as after a copy.
    os.utime(tmp_path / "checkpoint-2")
    cut(tmp_path / "checkpoint-8" / "optimizer.pt")
    checkpoints.rotate(tmp_path, 8, 1)
    assert names() == [f"checkpoint-{step}" for step in (2, 4, 6, 8)], "the one just written is not complete"
    checkpoints.rotate(tmp_path, 6, None)
    assert len(names()) == 4
    checkpoints.rotate(tmp_path, 6, 2, best=str(tmp_path / "checkpoint-2"))
    assert names() == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    checkpoints.rotate(tmp_path, 6, 2)
    assert names() == [f"checkpoint-{step}" for step in (4, 6, 8)]
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    checkpoints.rotate(tmp_path, 6, 2)
    assert names() == ["checkpoint-6", "checkpoint-8"], "half an old one does not count"


def test_save_total_limit_counts_by_step_also_where_the_clock_says_otherwise(
    tiny: TinyLlava, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    os.utime(tmp_path / "run" / "checkpoint-2", (4e9, 4e9))
    again(tiny, tmp_path / "run", save_total_limit=1)
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-4"]
    assert_equal(whole, tmp_path / "run")


def test_a_disk_that_fills_up_in_a_save_is_one_clear_error_and_the_same_command_goes_on(
    tiny: TinyLlava, whole: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoint-4")
    before = contents(run / "checkpoint-2")
    size = (whole / "checkpoint-4" / "optimizer.pt").stat().st_size
    with pytest.raises(SystemExit) as stopped, largest_file(size - 1):
        again(tiny, run)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"checkpoint-4 could not be written to {run}" in error
    assert "Free some space; the same command then resumes" in error
    assert [path.name for path in run.iterdir()] == ["checkpoint-2"]
    assert contents(run / "checkpoint-2") == before
    again(tiny, run)
    assert_equal(whole, run)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with file_system(tmp_path / "disk", "8m") as folder:
        yield folder


def test_an_output_folder_that_is_read_only_is_refused_before_the_first_step(
    tiny: TinyLlava, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mount("-o", "remount,ro", str(disk))
    with pytest.raises(SystemExit) as stopped:
        again(tiny, disk / "run")
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert f"--output_dir {disk / 'run'} cannot be written" in captured.err
    assert "'loss'" not in captured.out


def test_a_checkpoint_of_another_kind_of_training_is_refused_with_what_to_do(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = TrainingArguments(str(run), use_cpu=True)
    with pytest.raises(CheckpointError, match="written without DeepSpeed, and this training runs with it") as error:
        checkpoints.checkpoint_to_resume(True, args, deepspeed=True)
    assert "--adapter_path" in str(error.value)
    newest = run / "checkpoint-4"
    (newest / "rng_state.pth").rename(newest / "rng_state_0.pth")
    shutil.copy(newest / "rng_state_0.pth", newest / "rng_state_1.pth")
    with caplog.at_level(logging.WARNING):
        assert checkpoints.checkpoint_to_resume(True, args, deepspeed=False) == newest
    assert "was written by 2 rank(s), not 1" in caplog.text
    (newest / integrity.LATEST).write_text("global_step4")
    with pytest.raises(CheckpointError, match="DeepSpeed's parts of 2 rank"):
        checkpoints.checkpoint_to_resume(str(newest), args, deepspeed=True)
    (newest / "global_step4").mkdir()
    for part in ("zero_pp_rank_0_optim_states", "zero_pp_rank_1_optim_states", "mp_rank_00_model_states"):
        shutil.copy(newest / "optimizer.pt", newest / "global_step4" / f"{part}.pt")
    with pytest.raises(CheckpointError, match=r"written by 2 rank.* and DeepSpeed cannot resume it with 1"):
        checkpoints.checkpoint_to_resume(str(newest), args, deepspeed=True)


def test_checkpoints_that_hold_the_model_only_are_whole_where_that_was_asked_for(run: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (run / "checkpoint-4" / name).unlink()
    assert checkpoints.newest_complete(run, without_states=True) == 4
    assert checkpoints.newest_complete(run) == 2
