"""Write files so that a reader finds the old one or the whole new one, whenever the writing ends."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SUFFIX = ".partial"


def write_whole(file: Path, text: str) -> None:
    """Write a text in UTF-8, with its line ends as they are.

    Raises:
        OSError: it cannot be written; what was there before is unharmed.
    """
    with partials(file) as (part,):
        part.write_text(text, encoding="utf-8", newline="")


@contextmanager
def partials(*files: Path) -> Iterator[list[Path]]:
    """Give each file another name beside it, to be written in the block; then all of them take the files' places.

    They are on the disk before the first does. Where the block fails, none does, and nothing of them is left.

    Raises:
        OSError: one was not written, or cannot be put in its place.
    """
    parts = [file.with_name(f".{file.name}.{os.getpid()}{SUFFIX}") for file in files]
    try:
        yield parts
        for part in parts:
            flush(part)
        for part, file in zip(parts, files, strict=True):
            os.replace(part, file)
    finally:
        for part in parts:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Force a file or folder to the disk.

    Raises:
        OSError: it is not there, or the disk refuses it.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_partials(folder: Path, names: Collection[str]) -> None:
    """Delete what processes that were killed have left in a folder of files, or folders, of these names.

    Raises:
        OSError: the folder cannot be written.
    """
    for path in folder.glob(f".*{SUFFIX}"):
        name, _, process = path.name.removeprefix(".").removesuffix(SUFFIX).rpartition(".")
        # In a container, the process before may have had the number of this one.
        if name in names and process.isdigit() and (int(process) == os.getpid() or not runs(int(process))):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def runs(process: int) -> bool:
    """Tell whether a process of this number runs on this machine."""
    if process <= 0:
        return False
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
