"""Check whether a checkpoint is complete: everything that resuming needs is there, and no file is cut short."""

from __future__ import annotations

import json
import re
import zipfile
from contextlib import suppress
from pathlib import Path

from llava_steering_plugin.adapters.stored.folder import AdapterFolder
from llava_steering_plugin.errors import AdapterError
from llava_steering_plugin.training.saving import notes

NAME = re.compile(r"checkpoint-(\d+)")
STATE = "trainer_state.json"
# Of DeepSpeed: a file that names the folder which holds one part for each rank.
LATEST = "latest"


def checkpoint_problems(folder: Path, *, without_states: bool = False, deep: bool = True) -> list[str]:
    """Return what keeps a training from resuming from this checkpoint; nothing if it is complete.

    Args:
        folder: a checkpoint.
        without_states: it was saved with `--save_only_model`.
        deep: read every file; otherwise headers and lengths only.
    """
    problems = []
    try:
        adapter = AdapterFolder(folder)
        _ = adapter.read() if deep else adapter.config
    except AdapterError as error:
        problems.append(str(error))
    match = NAME.fullmatch(folder.name)
    step = _saved_step(folder)
    if step is None:
        problems.append(f"{STATE} is missing or cut short")
    elif match and step != int(match[1]):
        problems.append(f"{STATE} belongs to step {step}")
    problems += notes.problems(folder)
    if without_states:
        return problems
    ranks = ranks_of(folder)
    if not ranks:
        problems.append("the random states are missing: rng_state.pth, or one file for each rank")
    problems += _missing_from_deepspeed(folder, ranks) if uses_deepspeed(folder) else _missing(folder)
    saved = [path for path in sorted(folder.rglob("*")) if path.suffix in (".pt", ".pth")]
    return problems + [f"{path.relative_to(folder)} is cut short" for path in saved if not _is_sound(path, deep)]


def _saved_step(folder: Path) -> int | None:
    try:
        return int(json.loads((folder / STATE).read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def uses_deepspeed(folder: Path) -> bool:
    """Return whether DeepSpeed wrote the checkpoint."""
    return (folder / LATEST).is_file()


def ranks_of(folder: Path) -> int:
    """Return how many ranks wrote the checkpoint, by their random states; 0 if there are none, or some are missing."""
    if (folder / "rng_state.pth").is_file():
        return 1
    numbers = {int(path.stem.rpartition("_")[2]) for path in folder.glob("rng_state_*.pth")}
    return len(numbers) if numbers == set(range(len(numbers))) else 0


def _missing(folder: Path) -> list[str]:
    return [f"{name} is missing" for name in ("optimizer.pt", "scheduler.pt") if not (folder / name).is_file()]


def _missing_from_deepspeed(folder: Path, ranks: int) -> list[str]:
    with suppress(OSError, UnicodeDecodeError):
        tag = (folder / LATEST).read_text(encoding="utf-8").strip()
        parts = len(list((folder / tag).glob("*_optim_states.pt"))) if tag else 0
        if parts == ranks and list((folder / tag).glob("*_model_states.pt")):
            return []
    return [f"DeepSpeed's parts of {ranks} rank(s) are not all there"]


def _is_sound(path: Path, deep: bool) -> bool:
    """Return whether torch.save finished this file: it writes zip archives, with checksums, and their index last."""
    try:
        with zipfile.ZipFile(path) as archive:
            return not deep or archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
