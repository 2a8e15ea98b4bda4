"""Follow --resume_from_checkpoint, which LLaVA itself ignores: it resumes from the newest in --output_dir, or not."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

from llava_steering_plugin.errors import CheckpointError, listing
from llava_steering_plugin.training.saving.checkpoints import by_step, model_only
from llava_steering_plugin.training.saving.integrity import NAME, STATE, checkpoint_problems
from llava_steering_plugin.training.saving.output_folder import output_problems, without_states

logger = logging.getLogger(__name__)
FLAG = "--resume_from_checkpoint"
YES, NOT = ("true", "yes", "1"), ("false", "no", "0", "none", "")


def folder_problems(flags: Namespace) -> list[str]:
    """Return what is wrong with --output_dir and with the checkpoint to resume from, before a model is loaded."""
    output, wish = Path(flags.output_dir).expanduser(), flags.resume_from_checkpoint
    if problems := output_problems(output):
        return problems
    there = by_step(output) if output.is_dir() else {}
    newest = next(iter(there.values()), None)
    if newest is not None and flags.overwrite_output_dir:
        return [
            f"--overwrite_output_dir: {output} holds {newest.name}, and LLaVA resumes from it. Move it away, or give "
            "another --output_dir"
        ]
    if newest is not None and not model_only(flags) and without_states(newest):
        return [_no_states(newest)]
    if wish is None or wish.lower() in YES:
        return []
    if wish.lower() in NOT:
        return [] if newest is None else [f"{FLAG} {wish}: {output} holds {newest.name}, and LLaVA resumes from it"]
    return _wish_problems(Path(wish).expanduser(), output, there)


def _wish_problems(folder: Path, output: Path, there: dict[int, Path]) -> list[str]:
    """Return why a training cannot resume from a folder; `there` are the checkpoints of its output folder."""
    if not folder.is_dir():
        return [f"{FLAG} {folder}: there is no such folder"]
    if not NAME.fullmatch(folder.name) and (inside := by_step(folder)):
        return [f"{FLAG} {folder} is no checkpoint, but holds some; the newest is {next(iter(inside.values()))}"]
    if without_states(folder):
        return [_no_states(folder)]
    if problems := checkpoint_problems(folder, deep=False):
        return [f"{FLAG} {folder}: a training cannot resume from it: {'; '.join(problems)}"]
    if not there:
        return []
    newest = next(iter(there.values()))
    if folder.resolve() == newest.resolve() or _goes_on_from(folder, newest):
        return []
    return [
        f"{FLAG} {folder}: --output_dir {output} holds {newest.name}, which LLaVA would resume from. Move what is "
        "newer away, or give another --output_dir"
    ]


def _goes_on_from(earlier: Path, later: Path) -> bool:
    """Return whether a checkpoint belongs to a training that was resumed from another one, by what both have logged."""
    try:
        first, second = (json.loads((each / STATE).read_text(encoding="utf-8")) for each in (earlier, later))
        logged = first["log_history"]
        if earlier.resolve().parent == later.resolve().parent:
            return False  # a step back was asked for
        return bool(first["global_step"] < second["global_step"] and second["log_history"][: len(logged)] == logged)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _no_states(folder: Path) -> str:
    return (
        f"{folder} holds no states to resume from: it is the result of a training, or saved with --save_only_model. "
        f"Start a new training from its weights: another --output_dir, and --adapter_path {folder}"
    )


def wish_of(asked: Any, args: Any) -> Any:
    """Return what a training is to resume from: a folder, True for the newest in --output_dir, or nothing.

    Args:
        asked: by the caller of the trainer. LLaVA says True where there are checkpoints in --output_dir.
        args: the training arguments.

    Raises:
        CheckpointError: a training cannot resume from what the flag names.
    """
    wish, output = args.resume_from_checkpoint, Path(args.output_dir)
    if wish is None or wish.lower() in NOT or not isinstance(asked, bool | None):
        return asked
    there = by_step(output) if output.is_dir() else {}
    if wish.lower() in YES:
        if not there and args.process_index == 0:
            logger.warning("%s %s: %s holds no checkpoint; the training starts from the beginning.", FLAG, wish, output)
        return bool(there) or None
    folder = Path(wish).expanduser()
    if problems := _wish_problems(folder, output, there):
        raise CheckpointError(listing("this training cannot resume", problems))
    newest = next(iter(there.values()), None)
    if newest is None or folder.resolve() == newest.resolve():
        return folder
    if args.process_index == 0:
        logger.warning("%s: the training was resumed from it before, and goes on from %s.", FLAG, newest)
    return True


def refuse_without_states(checkpoint: Path) -> None:
    """Refuse to go on without optimizer and schedule: both would start anew in the middle of a training.

    Raises:
        CheckpointError: the checkpoint was saved with --save_only_model.
    """
    if without_states(checkpoint):
        raise CheckpointError(f"{_no_states(checkpoint)}.")
