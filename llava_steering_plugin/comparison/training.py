"""Train a cell, or find it trained; say what became of it in `trained.json`, which only a training that ended has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llava_steering_plugin.comparison import commands
from llava_steering_plugin.comparison.cells import Cell
from llava_steering_plugin.comparison.logs import end_of
from llava_steering_plugin.comparison.processes import Command
from llava_steering_plugin.comparison.records import DIVERGED, DONE, FAILED
from llava_steering_plugin.comparison.schema import Comparison
from llava_steering_plugin.whole_files import write_whole

TRAINED = "trained.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
# Files of a training in its folder that are not loaded with the model.
NOT_LOADED = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
# A program of the comparison: it takes an exit status for each command that it yields.
Steps = Generator[Command, int, Any]


@dataclass(frozen=True)
class Trained:
    """Holds what became of a training.

    Attributes:
        losses: [step, loss]; the loss is None where it is no finite number.
        measured: what `launch --measure` has written.
    """

    status: str
    error: str | None = None
    losses: list[Any] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    file_bytes: int = 0


def find_trained(folder: Path) -> Trained | None:
    """Return what became of a training that has ended; None if it has to run."""
    try:
        found = Trained(**json.loads((folder / TRAINED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    # A training that diverged may have left no model, and would diverge again.
    return found if found.status == DIVERGED or (folder / commands.MODEL).is_dir() else None


def train(cell: Cell, comparison: Comparison, output: Path, env: Mapping[str, str]) -> Generator[Command, int, Trained]:
    """Yield the command that trains a cell, unless it is trained, and return what became of it.

    Raises:
        OSError: the folder of the cell cannot be written.
    """
    folder = cell.folder(output)
    if (found := find_trained(folder)) is not None:
        return found
    _prepare(cell, folder)
    words = commands.launched(commands.train(cell, comparison, output), comparison.launcher)
    status = yield Command(words, folder / commands.TRAIN_LOG, env, fork=not comparison.launcher)
    trained = _outcome(folder, status)
    if trained.status != FAILED:  # what failed is tried again by the next run
        write_whole(folder / TRAINED, json.dumps(asdict(trained)) + "\n")
    return trained


def _prepare(cell: Cell, folder: Path) -> None:
    """Clear the folder of what must not be taken for this training's.

    Checkpoints of trainings with a mode stay: they go on from there, to the bit. Others begin again, because LLaVA
    cannot tell a whole checkpoint from half of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    goes_on = cell.method.has_mode and any((folder / commands.MODEL).glob("checkpoint-*"))
    for path in folder.iterdir():
        if not (goes_on and path.name in (commands.MODEL, commands.MEASURED)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _outcome(folder: Path, status: int) -> Trained:
    measured = _json(folder / commands.MEASURED)
    losses = list(measured.pop("losses", None) or [])
    hopeless = bool(losses) and losses[-1][1] is None
    size = _bytes_of(folder / commands.MODEL)
    if hopeless:
        step = next(step for step, loss in losses if loss is None)
        error = f"diverged: the loss is no finite number from step {step} on"
        return Trained(DIVERGED, error, losses, measured, size)
    if status:
        return Trained(FAILED, end_of(folder / commands.TRAIN_LOG, status, "the training"), losses, measured, size)
    return Trained(DONE, None, losses, measured, size)


def _bytes_of(model: Path) -> int:
    with suppress(OSError):
        return sum(
            file.stat().st_size
            for file in model.iterdir()
            if file.suffix in WEIGHTS and file.name not in NOT_LOADED and file.is_file()
        )
    return 0


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
