"""The checkpoint folders of a training: which one it goes on from, how they are written, and which may be deleted.

transformers writes `tmp-checkpoint-N` and renames it to `checkpoint-N` once all ranks have written. It goes on from the
highest N and deletes what is oldest by the clock, and looks into neither.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from llava_steering_plugin.adapters.folder import CARD
from llava_steering_plugin.adapters.writing import remove_leftovers
from llava_steering_plugin.errors import AdapterError, CheckpointError, listing
from llava_steering_plugin.training.integrity import NAME, problems_in, ranks_of, uses_deepspeed

logger = logging.getLogger(__name__)

# Of transformers, and ours for what is about to be deleted: nobody takes these for checkpoints.
STAGED = "tmp-"
# What a damaged checkpoint is renamed to, so that the training can write its own when it gets there again.
ASIDE = "damaged-"
# How torch says that a file could not be written; it has no error class for it.
TORCH_CANNOT_WRITE = ("inline_container", "iostream error", "Parent directory")


def model_only(args: Any) -> bool:
    """Whether checkpoints are saved without optimizer and random states; before 4.37, transformers has no such flag."""
    return bool(getattr(args, "save_only_model", False))


def by_step(output: Path) -> dict[int, Path]:
    """The checkpoints in a folder, whole or not, the newest first."""
    found = {int(match[1]): path for path in output.iterdir() if (match := NAME.fullmatch(path.name)) and path.is_dir()}
    return dict(sorted(found.items(), reverse=True))


def prepare(output: Path) -> None:
    """Makes the output folder ready: it can be written, and what killed processes have left in it is gone.

    Raises:
        CheckpointError: it cannot be written. Better known now than at the first save.
    """
    probe = output / f".{CARD}.{os.getpid()}.partial"
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        remove_leftovers(output)
        for folder in output.glob(f"{STAGED}checkpoint-*"):
            logger.warning("%s was left by a training that was killed; it is deleted.", folder)
            shutil.rmtree(folder)
    except OSError as error:
        raise CheckpointError(
            f"--output_dir {output} cannot be written: {error}. Choose another folder, or make this one writable."
        ) from error


def newest(output: Path, without_states: bool = False) -> int:
    """Step of the newest checkpoint that is whole; 0 if there is none.

    Newer ones that are not whole are set aside: the training is going to write these steps again.

    Raises:
        CheckpointError: one of them cannot be set aside.
    """
    for step, folder in by_step(output).items():
        problems = problems_in(folder, without_states=without_states)
        if not problems:
            return step
        aside = _set_aside(folder, problems)
        logger.warning(listing(f"{folder} is not whole; it is now {aside.name}, and not used", problems))
    return 0


def _set_aside(folder: Path, problems: list[str]) -> Path:
    aside = folder.with_name(ASIDE + folder.name)
    try:
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)
    except OSError as error:
        headline = (
            f"{folder} is not whole, and cannot be renamed to {aside.name} ({error}); make {folder.parent} writable, "
            "or delete both"
        )
        raise CheckpointError(listing(headline, problems)) from error
    return aside


def starting_point(wish: str | os.PathLike[str] | bool | None, args: Any, deepspeed: bool) -> Path | None:
    """The checkpoint to go on from, the same on every rank: all must call it. None: from the beginning.

    Args:
        wish: a folder, True for the newest in the output folder, or nothing.
        args: the training arguments.
        deepspeed: whether this training runs under DeepSpeed.

    Raises:
        CheckpointError: the chosen checkpoint is not whole, one that is not cannot be set aside, ranks see other
            folders, or it was written by another kind of training.
    """
    output, step = Path(args.output_dir), 0
    if args.process_index == 0 and wish is True:
        step = newest(output, model_only(args))
        if not step:
            logger.warning("no checkpoint in %s is whole, so the training starts from the beginning.", output)
    if isinstance(wish, (str, os.PathLike)):
        folder = Path(wish)
        if problems := problems_in(folder, without_states=model_only(args)):
            raise CheckpointError(listing(f"a training cannot go on from {folder}", problems))
    else:
        step = _of_rank_0(step, args.device)
        if not step:
            return None
        folder = output / f"checkpoint-{step}"
        if not folder.is_dir():
            raise CheckpointError(
                f"rank 0 goes on from {folder} and rank {args.process_index} has no such folder. --output_dir must be "
                "on storage that all machines share."
            )
    if not model_only(args):
        _check_kind(folder, args.world_size, deepspeed)
    return folder


def _of_rank_0(number: int, device: torch.device) -> int:
    if not (distributed.is_available() and distributed.is_initialized()):
        return number
    shared = torch.tensor(number, device=device)
    distributed.broadcast(shared, 0)
    return int(shared)


def _check_kind(folder: Path, world_size: int, deepspeed: bool) -> None:
    afresh = "To start anew from its weights, give another --output_dir and --adapter_path with this checkpoint"
    if uses_deepspeed(folder) != deepspeed:
        how = ("without", "with") if deepspeed else ("with", "without")
        raise CheckpointError(
            f"{folder} was written {how[0]} DeepSpeed, and this training runs {how[1]}: its optimizer cannot be read. "
            f"{afresh}."
        )
    if (ranks := ranks_of(folder)) != world_size:
        if deepspeed:
            raise CheckpointError(
                f"{folder} was written by {ranks} rank(s), and DeepSpeed cannot go on with {world_size}. Start as many "
                f"again. {afresh}."
            )
        logger.warning("%s was written by %d rank(s), not %d: batches and dropout differ.", folder, ranks, world_size)


@contextmanager
def clear_errors(output: Path, what: str, tidy: bool) -> Iterator[None]:
    """Turns "disk full" and its like into one message; with `tidy`, what was half-written is deleted.

    Raises:
        CheckpointError: something could not be written.
    """
    try:
        yield
    except (OSError, RuntimeError, AdapterError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # of the network, not of the disk
        if isinstance(error, RuntimeError) and not any(mark in str(error) for mark in TORCH_CANNOT_WRITE):
            raise
        if tidy:
            for folder in output.glob(f"{STAGED}checkpoint-*"):
                shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(
            f"{what} could not be written to {output}: {error}. The checkpoints before it are as they were: free some "
            "space, and the same command goes on from the last of them."
        ) from error


def make_room(output: Path, step: int) -> None:
    """Moves away a checkpoint of this step from an earlier run: transformers would write into it, file by file."""
    folder = output / f"checkpoint-{step}"
    if folder.is_dir():
        _discard(folder)


def rotate(
    output: Path, current: int, limit: int | None, *, without_states: bool = False, best: str | None = None
) -> None:
    """Deletes the oldest checkpoints beyond `limit`; only whole ones count, and the current one is one of them.

    Args:
        output: the folder with the checkpoints.
        current: step of the checkpoint that has just been written. It is forced to the disk before any other goes.
        limit: how many stay; None or 0: all.
        without_states: whether checkpoints of `--save_only_model` are whole.
        best: path of a checkpoint that stays whatever its age.
    """
    flush(output / f"checkpoint-{current}")
    if not limit or limit < 0:
        return
    found = by_step(output)
    whole = [
        step for step, folder in found.items() if not problems_in(folder, without_states=without_states, deep=False)
    ]
    kept = sorted(whole, key=lambda step: (step != current, -step))[:limit]
    if current not in kept:
        return  # what was written a moment ago is not there: whoever finds out why will want the others
    for step, folder in found.items():
        if step < max(kept) and step not in kept and (best is None or folder != Path(best)):
            _discard(folder)


def _discard(folder: Path) -> None:
    # Renamed first: a deletion that is interrupted must not leave half a checkpoint under its name.
    doomed = folder.with_name(f"{STAGED}{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def flush(folder: Path) -> None:
    """Forces a folder with all that is in it to the disk."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
