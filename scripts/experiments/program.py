"""Check the machine, run stages and describe a run, for the programs of all experiments."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from experiments.stages import Runner, StageError
from llava_steering_plugin.checkout.find import find_llava
from llava_steering_plugin.checkout.patch import State, state

NEEDED_BYTES = 500e6
OUTPUT = Path("demo-output")
OutputOption = Annotated[Path, typer.Option(help="Folder for all results. Finished stages in it are used again.")]
QuickOption = Annotated[bool, typer.Option("--quick", help="Run every part, but too short to learn anything.")]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Number of training steps.")]
SeedsOption = Annotated[int | None, typer.Option(min=1, help="Number of seeds.")]
ProcessesOption = Annotated[int | None, typer.Option(min=1, help="How many trainings run at the same time.")]

S = TypeVar("S")


def sized(settings: S, steps: int | None, seeds: int | None, processes: int | None) -> S:
    """Return settings of a comparison (a dataclass with these fields), with what the command line gives instead."""
    given: dict[str, Any] = {
        "steps": steps,
        "seeds": tuple(range(1, seeds + 1)) if seeds else None,
        "processes": processes,
    }
    return replace(settings, **{name: value for name, value in given.items() if value})  # type: ignore[type-var]


@contextmanager
def runner_of(name: str, output: Path, quick: bool) -> Iterator[Runner]:
    """Yield a runner for the stages of experiment `name`, in `output` or its sub-folder `quick`.

    Raises:
        SystemExit: the folder cannot be made, the disk is full, LLaVA is not patched, or a stage failed.
    """
    root = (output / "quick" if quick else output).resolve()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(
            f"{name}: {root} cannot be made ({error.strerror}); give another place with --output"
        ) from error
    if shutil.disk_usage(root).free < NEEDED_BYTES:
        raise SystemExit(
            f"{name}: {root} has less than {NEEDED_BYTES / 1e6:.0f} MB free; give another place with --output"
        )
    if state(find_llava()) is not State.PATCHED:
        raise SystemExit(
            f"{name}: this llava is not patched; run `llava-steering patch`, or scripts/{name}.sh, which does it"
        )
    # Nothing here comes from a hub, and numbers from a GPU would differ.
    os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
    runner = Runner(root, Console())
    try:
        with runner.progress:
            yield runner
    except StageError as error:
        raise SystemExit(f"{name}: {error}") from error


def described(packages: Sequence[str], started: float) -> dict[str, Any]:
    """Return what results.json says of a run that began at `started` (time.monotonic): time, versions, machine."""
    return {
        "seconds_of_this_run": round(time.monotonic() - started, 1),
        "versions": {name: version(name) for name in packages},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
