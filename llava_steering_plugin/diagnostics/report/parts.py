"""The parts of a report: what each measure hands over to be shown, and how its numbers and names are written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NONE = "\N{EN DASH}"  # stands where there is no number
LONGEST_NAME = 24  # characters of a name in a figure; tables have the whole


@dataclass(frozen=True)
class Run:
    """Holds one result to draw.

    Attributes:
        measure: what was measured.
        label: tells it from the other runs of this measure.
        files: where it was found, as the user would write it.
        document: the JSON.
    """

    measure: str
    label: str
    files: tuple[str, ...]
    document: Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """Holds a figure of plotly with a title, and the words that say what is drawn to those who do not see it."""

    title: str
    description: str
    drawing: Any


@dataclass(frozen=True)
class Table:
    """Holds the heading and the rows of a table, as text; the first cell of a row is its heading."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """Holds what a report says of one measure.

    Attributes:
        title: its heading.
        source: what is measured, and where that is defined.
        findings: sentences made of the numbers alone.
        limits: what the numbers do not say.
        settings: tables of models and settings.
        tables: the numbers.
    """

    title: str
    source: str
    findings: Sequence[str]
    limits: Sequence[str]
    settings: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = field(default=())


def number(value: Any) -> float | None:
    """Return a number of a document as a float; None for null, NaN and infinity.

    Raises:
        ValueError: it is no number.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} stands where a number is expected")
    return float(value) if math.isfinite(value) else None


def numbers(values: Any) -> list[float | None]:
    """Return a list of numbers of a document, as `number` returns each.

    Raises:
        ValueError: it is no list of numbers.
    """
    if not isinstance(values, list):
        raise ValueError(f"{values!r} stands where a list of numbers is expected")
    return [number(value) for value in values]


def layer_numbers(values: Any) -> list[int]:
    """Return a list of layers of a document.

    Raises:
        ValueError: it is no list of whole numbers.
    """
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f"{values!r} stands where a list of layers is expected")
    return list(values)


def matrix(values: Any) -> list[list[float | None]]:
    """Return a list of lists of numbers of a document.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(values, list):
        raise ValueError(f"{values!r} stands where a matrix is expected")
    return [numbers(row) for row in values]


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the numbers that are defined; None if none is."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def written(value: float | None) -> str:
    """Return a number with three digits, as text and tables show it."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def between(low: float | None, middle: float | None, high: float | None) -> str:
    """Return a mean with its interval, if it has one."""
    ends = "" if low is None or high is None else f" ({written(low)} to {written(high)})"
    return written(middle) + ends


def shown(value: Any) -> str:
    """Return a setting as text."""
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {shown(each)}" for key, each in value.items()) or NONE
    if isinstance(value, list):
        return "; ".join(shown(each) for each in value) or NONE
    return str(value)


def short_names(names: Sequence[str], longest: int = LONGEST_NAME) -> list[str]:
    """Return names that fit into a figure, the middle of long ones left out, and no two alike."""
    found: list[str] = []
    for name in names:
        half = longest // 2 - 1
        short = name if len(name) <= longest else f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"
        again = 2
        unique = short
        while unique in found:
            unique, again = f"{short} ({again})", again + 1
        found.append(unique)
    return found


def models_of(runs: Sequence[Run]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return all models of some runs under names that differ: with the label of the run where two have one name."""
    models = [(run, model) for run in runs for model in run.document["models"]]
    names = [str(model["name"]) for _, model in models]
    return [
        (name if names.count(name) == 1 else f"{name} ({run.label})", model)
        for name, (run, model) in zip(names, models, strict=True)
    ]


def settings_table(runs: Sequence[Run]) -> Table:
    """Return the settings of some runs, a column for each run."""
    rows = [["file", *(", ".join(run.files) for run in runs)]]
    for key, title in (("date", "date"), ("plugin_version", "version of llava-steering-plugin")):
        rows.append([title, *(shown(run.document.get(key, "not recorded")) for run in runs)])
    keys = dict.fromkeys(key for run in runs for key in run.document.get("settings", {}) if key != "measure")
    for key in keys:
        rows.append([key.replace("_", " "), *(shown(run.document["settings"].get(key)) for run in runs)])
    return Table("Settings", ["", *(run.label for run in runs)], rows)


def models_table(runs: Sequence[Run], columns: Mapping[str, str]) -> Table:
    """Return what is known of the models: their kind, path and base, and other `columns` {key: heading}."""
    wanted = {"kind": "kind", "path": "path", "base": "base", **columns}
    rows = [[name, *(shown(model.get(key)) for key in wanted)] for name, model in models_of(runs)]
    return Table("Models", ["model", *wanted.values()], rows)


def differences(runs: Sequence[Run]) -> list[str]:
    """Return a sentence that names the settings in which some runs differ, if they do."""
    settings = [run.document.get("settings", {}) for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each)
    differing = [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]
    if not differing:
        return []
    words = ", ".join(key.replace("_", " ") for key in differing)
    return [f"These runs were measured with different settings ({words}), so differences may come from these too."]
