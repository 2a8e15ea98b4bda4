"""Write what a diagnosis has measured, and name what its measurements depend on."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from llava_steering_plugin import __version__
from llava_steering_plugin.adapters.stored.folder import WEIGHTS
from llava_steering_plugin.adapters.stored.locate import find
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.whole_files import partials

# Called with the model's name, the number of questions done, and how many there are.
Progress = Callable[[str, int, int], None]


def digest(file: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        ArgumentsError: it cannot be read.
    """
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ArgumentsError(f"{file} cannot be read: {error.strerror}.") from error


def weights_of(path: str) -> str | None:
    """Return the digest of an adapter's weights; None for what is no adapter of ours, whose files may be huge."""
    found = find(path)
    return None if found is None else digest(found.path / WEIGHTS)


def write_tables(document: Mapping[str, Any], rows: Iterable[Sequence[Any]], target: Path) -> list[Path]:
    """Write a result as JSON and its table as CSV, each whole or not at all, and return the files.

    The JSON also gets `plugin_version` and `date`. What is no finite number becomes null, as JSON has no other word.

    Args:
        rows: of the table, the heading first.
        target: the path of both, without the suffix.

    Raises:
        ArgumentsError: they cannot be written.
    """
    files = [target.with_name(f"{target.name}.{ending}") for ending in ("json", "csv")]
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    dated = _dated(_finite(document), files[0])
    texts = (json.dumps(dated, indent=1, allow_nan=False) + "\n", table.getvalue())
    try:
        with partials(*files) as parts:
            for part, text in zip(parts, texts, strict=True):
                part.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise ArgumentsError(f"{target.parent} cannot be written: {error.strerror}. Choose another.") from error
    return files


def _finite(value: Any) -> Any:
    """Return a document with null in the places of infinite numbers and NaN."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _dated(document: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Add the version of the package and the time in UTC; a result that the file holds already keeps its time."""
    result = {**document, "plugin_version": __version__}
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
        date = earlier.pop("date") if isinstance(earlier, dict) else None
    except (OSError, ValueError, KeyError):
        date = None
    if date is not None and earlier == json.loads(json.dumps(result)):
        return {**result, "date": date}
    return {**result, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
