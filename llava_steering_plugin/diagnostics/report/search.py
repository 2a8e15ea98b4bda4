"""Find the results that a report is made of, and read them. All that is wrong is said at once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_steering_plugin.diagnostics.report.parts import Run
from llava_steering_plugin.diagnostics.report.registry import DURING, MEASURES, TRAINING
from llava_steering_plugin.errors import ArgumentsError, Problems, listing

DEPTH = 2  # how many folders below a given one are looked into
HEAD = 4096  # bytes of a file in which the name of its measure is looked for
NAMED = re.compile(rb'^\s*\{\s*("settings":\s*\{\s*)?"measure":\s*"')
FILES = {measure.file: name for name, measure in MEASURES.items()}


def find_runs(places: Sequence[Path], problems: Problems) -> list[Run]:
    """Return the results in some folders and files, in the order of `MEASURES`; unknown measures come last.

    Args:
        places: results, or folders with results in them or up to two folders deeper.
        problems: gets the errors: nothing there, nothing to draw, a file that cannot be read.
    """
    files: dict[Path, Path] = {}  # as the user would write them, by where they are: none twice
    for place in places:
        with problems.noted():
            for file in _files_in(place):
                files.setdefault(file.resolve(), file)
    found: list[tuple[str, Path, dict[str, Any]]] = []
    for file in files.values():
        with problems.noted():
            document = _read(file)
            measure = _measure_of(document)
            if measure is not None:
                found.append((measure, file, document))
            elif file in places:
                raise ArgumentsError(f"{file} holds no result that can be drawn. {_wanted()}")
    if not found and not problems.errors:
        raise ArgumentsError(f"{', '.join(map(str, places))}: nothing to draw. {_wanted()}")
    order = [*MEASURES, *sorted({measure for measure, *_ in found} - MEASURES.keys())]
    runs = []
    for measure in order:
        own = [(file, document) for name, file, document in found if name == measure]
        labels = _labels([file for file, _ in own])
        runs += [
            Run(measure, label, (str(file),), document) for label, (file, document) in zip(labels, own, strict=True)
        ]
    return runs


def _files_in(place: Path) -> list[Path]:
    """Return the results at a place.

    Raises:
        ArgumentsError: it is not there, or holds none.
    """
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise ArgumentsError(f"{place} is neither a folder nor a file.")
    files = list(_walk(place))
    if not files:
        raise ArgumentsError(f"{place} holds nothing to draw, nor do the folders in it, {DEPTH} deep. {_wanted()}")
    return files


def _walk(top: Path) -> Iterator[Path]:
    for folder, inner, names in os.walk(top):
        here = Path(folder)
        training = MEASURES[TRAINING].file in names
        # A checkpoint's log is the beginning of the log of its training.
        inner[:] = sorted(name for name in inner if not (training and name.startswith("checkpoint-")))
        if len(here.relative_to(top).parts) == DEPTH:
            inner.clear()
        for name in sorted(names):
            if name in FILES or (name.endswith(".json") and _is_named(here / name)):
                yield here / name


def _is_named(file: Path) -> bool:
    """Say whether a file begins as results do; they may be of a measure that is not known here."""
    try:
        with file.open("rb") as opened:
            return NAMED.match(opened.read(HEAD)) is not None
    except OSError:
        return False


def _read(file: Path) -> dict[str, Any]:
    """Return the content of a file; of diagnostics.jsonl the first line as `settings` and the others as `passes`."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix != ".jsonl":
            document = json.loads(text)
        else:
            whole = text[: text.rfind("\n") + 1]  # a training may be writing the last line
            first, *passes = [json.loads(line) for line in whole.split("\n") if line]
            settings = {"measure": DURING, **_without(first, "samples")}
            written = {key: settings.pop(key) for key in ("plugin_version", "date") if key in settings}
            document = {**written, "settings": settings, "passes": passes}
    except OSError as error:
        raise ArgumentsError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ArgumentsError(f"{file} is damaged ({error}). Measure again, or leave it out.") from error
    if not isinstance(document, dict):
        raise ArgumentsError(f"{file} holds no result: it is no JSON object. Leave it out.")
    return document


def _without(content: Any, key: str) -> dict[str, Any]:
    """Return a JSON object without a key.

    Raises:
        TypeError: it is no object.
    """
    if not isinstance(content, dict):
        raise TypeError("its first line is no JSON object")
    return {name: value for name, value in content.items() if name != key}


def _measure_of(document: dict[str, Any]) -> str | None:
    for place in (document, document.get("settings")):
        if isinstance(place, dict) and isinstance(place.get("measure"), str):
            name: str = place["measure"]
            return name
    return TRAINING if "log_history" in document else None


def _wanted() -> str:
    lines = [f"{measure.file}: {measure.made_by}" for measure in MEASURES.values()]
    return listing("Looked for are", lines)


def _labels(files: Sequence[Path]) -> list[str]:
    """Return a name for each file: the part of its path in which it differs from the others."""
    parts = [list(file.absolute().with_suffix("").parts) for file in files]
    if len(parts) == 1:
        return [files[0].absolute().parent.name]
    while all(parts) and len({each[-1] for each in parts}) == 1:
        parts = [each[:-1] for each in parts]
    while all(parts) and len({each[0] for each in parts}) == 1:
        parts = [each[1:] for each in parts]
    return ["/".join(each) or str(file) for each, file in zip(parts, files, strict=True)]
