"""Read files in the official layouts of benchmarks, and say which file was expected where if one differs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_steering_plugin.errors import DataError


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the file in errors of the block that reads it.

    Raises:
        DataError: it is missing, damaged, or in another layout.
    """
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, csv.Error) as error:
        raise DataError(f"{path} is damaged: {error or type(error).__name__}. Get it again.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} is in another layout than the official one: {what}.") from error


def official(source: Path, *names: str) -> Path:
    """Return the file that is meant: the source itself, or the first of these names below it.

    Raises:
        DataError: it is not there.
    """
    if source.is_dir():
        for name in names:
            if (source / name).exists():
                return source / name
        raise DataError(f"{source} holds no {' or '.join(names)}. Is it the official folder?")
    if not source.exists():
        raise DataError(f"there is no {source}. Give {' or '.join(names)}, or the folder that holds it.")
    return source


def read_json(path: Path, kind: type, what: str) -> Any:
    """Read a JSON file.

    Args:
        kind: `dict` or `list`: what it must hold.
        what: what that is, for the error.

    Raises:
        DataError: it is missing, damaged, or holds something else.
    """
    with reading(path):
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(found, kind):
            raise ValueError(f"it should hold {what}")
        return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON objects, one a line; empty lines are none.

    Raises:
        DataError: it is missing, damaged, or holds something else; the message names the first such line.
    """
    found = []
    with reading(path):
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is no JSON ({error})") from error
            if not isinstance(entry, dict):
                raise ValueError(f"line {number} is no object")
            found.append(entry)
        if not found:
            raise ValueError("it is empty")
    return found


def keyed(path: Path, pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    """Return references by their keys as text.

    Raises:
        DataError: a key comes twice, or there are none.
    """
    found: dict[str, Any] = {}
    for key, reference in pairs:
        if str(key) in found:
            raise DataError(f"{path} holds question {key} twice.")
        found[str(key)] = reference
    if not found:
        raise DataError(f"{path} holds no questions.")
    return found


def text_or_none(entry: Mapping[str, Any], name: str) -> str | None:
    """Return a text of an entry; None: it has none.

    Raises:
        TypeError: it is something else, for `reading`.
    """
    return None if entry.get(name) is None else text_of(entry, name)


def text_of(entry: Mapping[str, Any], name: str) -> str:
    """Return a text of an entry.

    Raises:
        TypeError: it is something else, for `reading`.
    """
    if not isinstance(entry[name], str):
        raise TypeError(f"{name} {entry[name]!r} is no text")
    return str(entry[name])
