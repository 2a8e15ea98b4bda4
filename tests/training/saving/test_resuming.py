"""`--resume_from_checkpoint`, which LLaVA ignores, is followed, or refused with the reason.

Covers `training/saving/resuming.py`.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from rank_runs import assert_equal, losses
from tiny_llava import TinyLlava
from training_runs import FOUR_STEPS, train_flags, train_in_process


@pytest.fixture(scope="module")
def whole(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training with checkpoint-2 and checkpoint-4; read-only."""
    output = tmp_path_factory.mktemp("resumed") / "run"
    train_in_process(train_flags(tiny, output, FOUR_STEPS))
    return output


def train(tiny: TinyLlava, output: Path, wish: object, **overrides: object) -> None:
    torch.manual_seed(1234)
    train_in_process(train_flags(tiny, output, {**FOUR_STEPS, "resume_from_checkpoint": wish, **overrides}))


def refused(
    tiny: TinyLlava, output: Path, wish: object, capsys: pytest.CaptureFixture[str], **overrides: object
) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train(tiny, output, wish, **overrides)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert "'loss'" not in captured.out and "Traceback" not in captured.err
    return captured.err


def test_a_checkpoint_elsewhere_is_resumed_from_and_left_as_it_was(
    tiny: TinyLlava, whole: Path, tmp_path: Path
) -> None:
    before = sorted((whole / "checkpoint-2").iterdir())
    train(tiny, tmp_path / "run", whole / "checkpoint-2")
    assert len(losses(tmp_path / "run")) == 4
    assert_equal(whole, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]
    assert sorted((whole / "checkpoint-2").iterdir()) == before


def test_the_same_command_goes_on_from_what_it_has_written_itself(
    tiny: TinyLlava, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    train(tiny, run, whole / "checkpoint-2", max_steps=3, save_steps=1, lr_scheduler_type="constant")
    with caplog.at_level(logging.WARNING):
        train(tiny, run, whole / "checkpoint-2", max_steps=4, save_steps=1, lr_scheduler_type="constant")
    assert f"goes on from {run / 'checkpoint-3'}" in caplog.text
    assert len(losses(run)) == 4


def test_the_newest_of_the_output_folder_may_be_named_or_asked_for(
    tiny: TinyLlava, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, wish in enumerate(("checkpoint-2", "True")):
        run = tmp_path / str(number)
        shutil.copytree(whole / "checkpoint-2", run / "checkpoint-2")
        train(tiny, run, run / wish if wish != "True" else wish)
        assert_equal(whole, run)
    with caplog.at_level(logging.WARNING):
        train(tiny, tmp_path / "new", "True", max_steps=1, save_strategy="no")
    assert "the training starts from the beginning" in caplog.text
    train(tiny, tmp_path / "afresh", "False", max_steps=1, save_strategy="no")


def test_what_cannot_be_followed_is_refused(
    tiny: TinyLlava, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "run"
    shutil.copytree(whole / "checkpoint-4", own / "checkpoint-4")
    shutil.copytree(whole / "checkpoint-2", own / "checkpoint-2")
    assert "holds checkpoint-4, which LLaVA would resume from" in refused(tiny, own, own / "checkpoint-2", capsys)
    (own / "checkpoint-4" / "optimizer.pt").unlink()
    assert "optimizer.pt is missing" in refused(tiny, tmp_path / "new", own / "checkpoint-4", capsys)
    assert f"the newest is {whole / 'checkpoint-4'}" in refused(tiny, tmp_path / "new", whole, capsys)
    assert "there is no such folder" in refused(tiny, tmp_path / "new", tmp_path / "checkpoint-1", capsys)
    assert "holds checkpoint-4, and LLaVA resumes from it" in refused(tiny, own, "False", capsys)
    assert "--overwrite_output_dir" in refused(tiny, own, None, capsys, overwrite_output_dir=True)


def test_checkpoints_of_another_training_in_the_output_folder_do_not_win(
    tiny: TinyLlava, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(tiny, run, None, seed=7)
    (run / "trainer_state.json").unlink()
    shutil.rmtree(run / "checkpoint-4")
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-1")
    assert "holds checkpoint-2" in refused(tiny, run, whole / "checkpoint-2", capsys)


def test_a_checkpoint_of_the_adapter_alone_is_no_place_to_resume_from(
    tiny: TinyLlava, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(tiny, run, None, save_only_model=True, max_steps=3)
    assert not (run / "checkpoint-2" / "optimizer.pt").exists()
    for only in (True, False):
        error = refused(tiny, run, None, capsys, save_only_model=only, max_steps=3)
        assert "saved with --save_only_model" in error and f"--adapter_path {run / 'checkpoint-2'}" in error
    assert (run / "checkpoint-2").is_dir(), "it is sound, and not renamed"
    assert "saved with --save_only_model" in refused(tiny, tmp_path / "new", run / "checkpoint-2", capsys)
    # The end of a training needs nothing more.
    train(tiny, run, None, save_only_model=True, max_steps=2)
