"""Manage the checkpoint folders of a training: from which one it resumes, how they are written, which may be deleted.

transformers writes `tmp-checkpoint-N` and renames it to `checkpoint-N` once all ranks have written. It resumes from the
highest N and deletes the oldest by modification time, without looking into any of them.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from llava_steering_plugin.adapters.stored.folder import CARD
from llava_steering_plugin.adapters.stored.writing import remove_leftovers
from llava_steering_plugin.errors import AdapterError, CheckpointError, listing
from llava_steering_plugin.training.data.skipped import LIST as SKIPPED
from llava_steering_plugin.training.diagnostics.file import NAME as DIAGNOSTICS
from llava_steering_plugin.training.saving.integrity import NAME, checkpoint_problems, ranks_of, uses_deepspeed
from llava_steering_plugin.training.saving.output_folder import (
    ELSEWHERE,
    STAGED,
    free_name,
    is_foreign,
    output_problems,
    staged,
)
from llava_steering_plugin.whole_files import remove_partials

logger = logging.getLogger(__name__)

# Prefix for a damaged checkpoint, which is renamed so that the training can write this step again.
ASIDE = "damaged-"
# Parts of torch's messages for a file that cannot be written; it has no error class for it.
TORCH_CANNOT_WRITE = ("inline_container", "iostream error", "Parent directory")


def model_only(args: Any) -> bool:
    """Return whether checkpoints are saved without optimizer and random states, which transformers >= 4.37 can."""
    return bool(getattr(args, "save_only_model", False))


def by_step(output: Path) -> dict[int, Path]:
    """Return the checkpoints in a folder by step, complete or not, the newest first."""
    found = {int(match[1]): path for path in output.iterdir() if (match := NAME.fullmatch(path.name)) and path.is_dir()}
    return dict(sorted(found.items(), reverse=True))


def prepare_output(output: Path) -> None:
    """Check that the output folder can be written, and delete what killed processes have left in it.

    Raises:
        CheckpointError: it cannot be written, or holds what others have made. It is better to know this now than at
            the first save.
    """
    probe = output / f".{CARD}.{os.getpid()}.partial"
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        if problems := output_problems(output):
            raise CheckpointError(listing("this training cannot write its checkpoints", problems))
        remove_leftovers(output)
        remove_partials(output, (SKIPPED, DIAGNOSTICS))
        for folder in staged(output):
            logger.warning("%s was left by a training that was killed; it is deleted.", folder)
            shutil.rmtree(folder)
    except OSError as error:
        raise CheckpointError(
            f"--output_dir {output} cannot be written: {error}. Choose another folder, or make this one writable."
        ) from error


def newest_complete(output: Path, without_states: bool = False) -> int:
    """Return the step of the newest complete checkpoint; 0 if there is none.

    Newer ones that are not complete are renamed: the training will write these steps again.

    Raises:
        CheckpointError: one of them cannot be renamed.
    """
    for step, folder in by_step(output).items():
        if is_foreign(folder):
            continue
        problems = checkpoint_problems(folder, without_states=without_states)
        if not problems:
            return step
        aside = _set_aside(folder, problems)
        logger.warning(listing(f"{folder} is not complete; it is renamed to {aside.name} and not used", problems))
    return 0


def _set_aside(folder: Path, problems: list[str]) -> Path:
    aside = free_name(folder.with_name(ASIDE + folder.name))
    try:
        folder.rename(aside)
    except OSError as error:
        headline = (
            f"{folder} is not complete, and cannot be renamed to {aside.name} ({error}); make {folder.parent} "
            "writable, or delete both"
        )
        raise CheckpointError(listing(headline, problems)) from error
    return aside


def checkpoint_to_resume(wish: str | os.PathLike[str] | bool | None, args: Any, deepspeed: bool) -> Path | None:
    """Return the checkpoint to resume from, the same on every rank; None to start from the beginning.

    Every rank must call it: rank 0 decides.

    Args:
        wish: a folder, True for the newest in the output folder, or nothing.
        args: the training arguments.
        deepspeed: this training runs under DeepSpeed.

    Raises:
        CheckpointError: the checkpoint is not complete, an incomplete one cannot be renamed, ranks see different
            folders, or the checkpoint was written by another kind of training.
    """
    output, step = Path(args.output_dir), 0
    if args.process_index == 0 and wish is True:
        step = newest_complete(output, model_only(args))
        if not step:
            logger.warning("no checkpoint in %s is complete, so the training starts from the beginning.", output)
    if isinstance(wish, (str, os.PathLike)):
        folder = Path(wish)
        if problems := checkpoint_problems(folder, without_states=model_only(args)):
            raise CheckpointError(listing(f"a training cannot resume from {folder}", problems))
    else:
        step = _of_rank_0(step, args.device)
        if not step:
            return None
        folder = output / f"checkpoint-{step}"
        if not folder.is_dir():
            raise CheckpointError(
                f"rank 0 resumes from {folder}, and rank {args.process_index} has no such folder. --output_dir must be "
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
    afresh = "To start a new training from its weights, give another --output_dir, and this folder as --adapter_path"
    if uses_deepspeed(folder) != deepspeed:
        how = ("without", "with") if deepspeed else ("with", "without")
        raise CheckpointError(
            f"{folder} was written {how[0]} DeepSpeed, and this training runs {how[1]} it: its optimizer cannot be "
            f"read. {afresh}."
        )
    if (ranks := ranks_of(folder)) != world_size:
        if deepspeed:
            raise CheckpointError(
                f"{folder} was written by {ranks} rank(s), and DeepSpeed cannot resume it with {world_size}. Start as "
                f"many ranks again. {afresh}."
            )
        logger.warning(
            "%s was written by %d rank(s), not %d, so batches and dropout will differ.", folder, ranks, world_size
        )


@contextmanager
def explain_write_errors(output: Path, what: str, tidy: bool) -> Iterator[None]:
    """Turn errors such as a full disk into one message; with `tidy`, delete what was written in part.

    Raises:
        CheckpointError: something could not be written.
    """
    try:
        yield
    except (OSError, RuntimeError, AdapterError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # from the network, not from the disk
        if isinstance(error, RuntimeError) and not any(mark in str(error) for mark in TORCH_CANNOT_WRITE):
            raise
        if tidy:
            for folder in staged(output):
                shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(
            f"{what} could not be written to {output}: {error}. Earlier checkpoints are unchanged. Free some space; "
            "the same command then resumes from the newest of them."
        ) from error


def remove_step(output: Path, step: int) -> None:
    """Remove a checkpoint of this step from an earlier run: transformers would write into it, file by file.

    Raises:
        CheckpointError: it is of another kind of training.
    """
    folder = output / f"checkpoint-{step}"
    if folder.is_dir():
        if is_foreign(folder):
            raise CheckpointError(f"{folder} is of another kind of training, and would be overwritten. {ELSEWHERE}.")
        _discard(folder)


def rotate(
    output: Path, current: int, limit: int | None, *, without_states: bool = False, best: str | None = None
) -> None:
    """Delete the oldest checkpoints beyond `limit`. Only complete ones count, and the current one is among them.

    Args:
        output: the folder with the checkpoints.
        current: step of the checkpoint that has just been written. It is flushed to disk before another is deleted.
        limit: how many stay; None or 0: all.
        without_states: checkpoints were saved with `--save_only_model`.
        best: path of a checkpoint that stays whatever its age.
    """
    flush(output / f"checkpoint-{current}")
    if not limit or limit < 0:
        return
    found = by_step(output)
    complete = [
        step
        for step, folder in found.items()
        if not checkpoint_problems(folder, without_states=without_states, deep=False)
    ]
    kept = sorted(complete, key=lambda step: (step != current, -step))[:limit]
    if current not in kept:
        return  # the checkpoint just written is damaged: keep the others until the reason is known
    for step, folder in found.items():
        if step < max(kept) and step not in kept and (best is None or folder != Path(best)) and not is_foreign(folder):
            _discard(folder)


def _discard(folder: Path) -> None:
    # Renamed first: an interrupted deletion must not leave part of a checkpoint under its name.
    doomed = folder.with_name(f"{STAGED}{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def flush(folder: Path) -> None:
    """Flush a folder and everything in it to disk."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def random_states_allowed() -> AbstractContextManager[Any]:
    """Allow torch.load to read the random states that transformers pickles, and nothing else beside tensors.

    Since torch 2.6 it refuses those of numpy by default, and transformers 4.37 could not resume.
    """
    allow = getattr(torch.serialization, "safe_globals", None)
    if allow is None:
        return nullcontext()
    keys = np.zeros(1, np.uint32)  # the type of the state of numpy's generator
    return allow([keys.__reduce__()[0], np.ndarray, np.dtype, type(keys.dtype)])
