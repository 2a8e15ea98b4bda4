"""Opens the files of adapters, bases and vision towers: regular files only, no larger than their kind allows.

A stranger may have made the folder. Opening a named pipe waits for a writer, reading a device never ends, and a few
bytes of JSON or of a sparse file become gigabytes in memory. Links are followed, since the hub's cache is made of them.
Nothing else in this package opens such a file (tests/test_foreign_files.py looks for it).
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from llava_steering_plugin.errors import SteeringError

MIB = 1 << 20
# The largest file of each kind that is read; honest ones have a hundredth of it, or less.
CONFIG_BYTES = MIB  # adapter configs, LLaVA's config.json, the authors' JSON files
INDEX_BYTES = 64 * MIB  # names of the tensors of a model in several files
WEIGHT_BYTES = 16 << 30  # one adapter; its tensors are compared with its base before they are read into memory
MODEL_BYTES = 1 << 40  # one file of a model or of a released checkpoint, which is mapped and not read
# How many values one JSON text may hold, and how deep they may lie in each other.
JSON_VALUES, JSON_DEPTH = 300_000, 64

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_CLOEXEC", 0)


class UnusableFile(OSError):
    """A file that is there and is not read: it is no regular file, or larger than its kind may be."""

    def __init__(self, path: str | os.PathLike[str], reason: str):
        super().__init__(errno.EINVAL, reason, os.fspath(path))
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


@contextmanager
def opened(path: str | os.PathLike[str], limit: int) -> Iterator[BinaryIO]:
    """Open a file for reading, without buffer and without waiting for anything.

    Args:
        path: links are followed.
        limit: the largest size in bytes.

    Raises:
        UnusableFile: no regular file, or larger than `limit`.
        OSError: not there, a folder, or closed to this user.
    """
    # Opening some devices has effects, so they are told before; what counts is what has been opened.
    _check(path, os.stat(path), limit)
    handle = os.open(path, _FLAGS)
    try:
        _check(path, os.fstat(handle), limit)
        file = open(handle, "rb", buffering=0)
    except BaseException:
        os.close(handle)
        raise
    with file:
        yield file


def _check(path: str | os.PathLike[str], status: os.stat_result, limit: int) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(status.st_mode):
        raise UnusableFile(path, f"it is {_KINDS.get(stat.S_IFMT(status.st_mode), 'no file')} and no regular file")
    if status.st_size > limit:
        raise UnusableFile(path, f"it has {status.st_size:,} bytes, and a file of its kind at most {limit:,}")


def readable(path: str | os.PathLike[str], limit: int) -> bool:
    """Tell whether there is such a file. A folder of that name is none.

    Raises:
        OSError: there is one that cannot be read.
    """
    try:
        with opened(path, limit):
            return True
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return False


def read_bytes(path: str | os.PathLike[str], limit: int = CONFIG_BYTES) -> bytes:
    """Read a whole file, also one that grows in the meantime, as far as it is not larger than `limit` then.

    Raises:
        OSError: as `opened`.
    """
    parts: list[bytes] = []
    left = limit + 1
    with opened(path, limit) as file:
        while left > 0 and (part := os.read(file.fileno(), min(left, MIB))):
            parts.append(part)
            left -= len(part)
    if left <= 0:
        raise UnusableFile(path, f"it has more than {limit:,} bytes, the most of a file of its kind")
    return b"".join(parts)


def read_text(path: str | os.PathLike[str], limit: int = CONFIG_BYTES, errors: str = "strict") -> str:
    """Read a file in UTF-8.

    Raises:
        OSError: as `opened`.
        ValueError: it is no UTF-8.
    """
    return read_bytes(path, limit).decode("utf-8", errors)


def parse_json(text: str, values: int = JSON_VALUES) -> Any:
    """Parse JSON of a stranger's: no more than `values` values, and not too deep in each other.

    Raises:
        ValueError: it is no JSON, or too much of it.
    """
    # Before it is parsed: an empty list takes two bytes of text and sixty of memory.
    if sum(map(text.count, "[{,")) > values:
        raise ValueError(f"it holds more than {values:,} values")
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > JSON_DEPTH:
        _check_depth(data)
    return data


_TOO_DEEP = f"its values lie more than {JSON_DEPTH} deep in each other"


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(JSON_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def read_json(path: str | os.PathLike[str], limit: int = CONFIG_BYTES) -> Any:
    """Read a JSON file.

    Raises:
        OSError: as `opened`.
        ValueError: it is no UTF-8 or no JSON, or too much of it.
    """
    return parse_json(read_text(path, limit), values=max(JSON_VALUES, limit // 32))


@contextmanager
def pinned(path: str | os.PathLike[str], limit: int = MODEL_BYTES) -> Iterator[str]:
    """Give a library that opens files by name the name of one that is open, so that nothing can take its place.

    Raises:
        OSError: as `opened`.
    """
    with opened(path, limit) as file:
        name = f"/proc/self/fd/{file.fileno()}"
        yield name if os.path.exists(name) else os.fspath(path)


def irregular(folder: str | os.PathLike[str]) -> list[str]:
    """Return the names in a folder that stand for pipes, sockets or devices: other programs would wait for them.

    Raises:
        OSError: the folder cannot be read.
    """
    found = []
    for path in sorted(Path(folder).iterdir()):
        try:
            mode = path.stat().st_mode
        except OSError:
            continue  # a link to nothing, or closed: whoever opens it gets an error at once
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            found.append(path.name)
    return found


def check_folder(folder: str, what: str) -> None:
    """Refuse a folder in which a program that loads a model would wait for a pipe or a device for ever.

    Raises:
        SteeringError: there is one in it, or it cannot be read. A name that is no folder's is no matter.
    """
    if not os.path.isdir(folder):
        return
    try:
        found = irregular(folder)
    except OSError as error:
        raise SteeringError(f"{what} {folder} cannot be read: {error}") from error
    if found:
        raise SteeringError(
            f"{what} {folder} holds {cut(', '.join(found))}, which is no regular file: loading would wait for it. "
            "Remove it, or copy the model again."
        )


def brief(value: object, longest: int = 80) -> str:
    """Return `repr(value)` for a message, cut after `longest` characters."""
    if isinstance(value, str | bytes):
        value = value[: longest + 1]
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes
        return f"a long {type(value).__name__}"
    return text if len(text) <= longest else text[: longest - 3] + "..."


def cut(name: str, longest: int = 200) -> str:
    """Return a name for a message, cut after `longest` characters."""
    return name if len(name) <= longest else name[: longest - 3] + "..."
