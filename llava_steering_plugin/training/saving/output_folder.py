"""Keep out of output folders that hold what others have made: a training writes, renames and deletes in its own."""

from __future__ import annotations

import os
import re
from pathlib import Path

from llava_steering_plugin.adapters.stored.folder import OLD_CONFIG
from llava_steering_plugin.adapters.stored.locate import find
from llava_steering_plugin.errors import AdapterError
from llava_steering_plugin.training.saving.integrity import LATEST, NAME, STATE, checkpoint_problems
from llava_steering_plugin.training.saving.notes import NOTES

# Prefix of transformers for folders that are being written, and ours for those that are being deleted.
STAGED = "tmp-"
_STAGED_NAME = re.compile(rf"{STAGED}checkpoint-\d+(\.old)?")
# What trainings without a mode write: the weights of models and of PEFT's adapters, and LLaVA's own.
_WEIGHTS = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|adapter_model\.bin"
    r"|mm_projector\.bin|non_lora_trainables\.bin"
)
ELSEWHERE = "Give another --output_dir, or move it away; nothing in it was changed"


def is_ours(folder: Path) -> bool:
    """Return whether a training with a mode wrote this folder, whatever has become of its files since."""
    try:
        return find(folder) is not None or (folder / NOTES).exists()
    except AdapterError:
        return False  # it may not be read, so it may not be renamed either


def is_foreign(folder: Path) -> bool:
    """Return whether a checkpoint is somebody else's: there is something in it, and nothing of ours."""
    try:
        return any(folder.iterdir()) and not is_ours(folder)
    except OSError:
        return True


def staged(output: Path) -> list[Path]:
    """Return what processes that were killed have left half-written, or half-deleted, of checkpoints."""
    return sorted(path for path in output.iterdir() if _STAGED_NAME.fullmatch(path.name) and path.is_dir())


def output_problems(output: Path) -> list[str]:
    """Return what keeps a training with a mode from writing into a folder: work of others that it would destroy."""
    if not output.is_dir():
        return []
    try:
        found = sorted(path for path in output.iterdir() if NAME.fullmatch(path.name) and path.is_dir())
        problems = [
            f"--output_dir {output} holds {path.name}, a checkpoint of another kind of training. {ELSEWHERE}"
            for path in found
            if is_foreign(path)
        ]
        problems += [
            f"--output_dir {output} holds {path.name}, half a checkpoint of another kind of training. {ELSEWHERE}"
            for path in staged(output)
            if _weights_of_others(path)
        ]
        if weights := _weights_of_others(output):
            problems.append(
                f"--output_dir {output} holds another model, or an adapter of PEFT's ({', '.join(weights[:3])}); an "
                f"adapter in the same folder would take its place. Give another --output_dir"
            )
    except OSError as error:
        return [f"--output_dir {output} cannot be read: {error.strerror}"]
    return problems


def _weights_of_others(folder: Path) -> list[str]:
    """Return the files in a folder that trainings without a mode write, and those with a mode do not."""
    names = sorted(path.name for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name))
    if (folder / OLD_CONFIG).is_file() and not is_ours(folder):
        names.insert(0, OLD_CONFIG)
    return names


def without_states(folder: Path) -> bool:
    """Return whether a checkpoint is whole as an adapter and was saved without states, by `--save_only_model`."""
    states = ("optimizer.pt", "scheduler.pt", LATEST)
    if any((folder / name).exists() for name in states) or any(folder.glob("rng_state*.pth")):
        return False
    return (folder / STATE).is_file() and not checkpoint_problems(folder, without_states=True, deep=False)


def free_name(path: Path) -> Path:
    """Return the path, or one like it that nothing has yet."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free
