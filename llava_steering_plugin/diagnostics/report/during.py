"""The section on what was measured during trainings, from diagnostics.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llava_steering_plugin.diagnostics.report.lines import Line, draw_lines
from llava_steering_plugin.diagnostics.report.parts import (
    Figure,
    Run,
    Section,
    Table,
    differences,
    number,
    numbers,
    settings_table,
    short_names,
    written,
)

FORMAT = 1
RATIO = ("lmar",)
# Where each quantity stands in a pass, its title, and what stands beside its axis.
QUANTITIES = {
    RATIO: ("Attention ratio", "attention ratio"),
    ("update_norms", "vis"): ("Relative size of the update, image tokens", "relative size"),
    ("update_norms", "text"): ("Relative size of the update, text tokens", "relative size"),
    ("routing", "router_entropy"): ("Entropy of the routers' probabilities", "router entropy"),
    ("routing", "factor_use"): ("Entropy of the factors' use", "entropy of use"),
}
Path = tuple[str, ...]


def during_section(runs: Sequence[Run]) -> Section:
    """Return what a report says of diagnostics.jsonl: curves by step, and each layer at the first and the last pass.

    Raises:
        KeyError, TypeError, ValueError: a document has another form.
    """
    for run in runs:
        if run.document["settings"]["format"] != FORMAT:
            raise ValueError(f"it is of format {run.document['settings']['format']!r}, and {FORMAT} is known")
    short = short_names([run.label for run in runs])
    named = list(zip(short, runs, strict=True))
    figures = []
    for path, (title, y) in QUANTITIES.items():
        curves = [
            Line(name, [step for step, _ in found], [value for _, value in found], look=look)
            for look, (name, run) in enumerate(named)
            if (found := _curve(run, path))
        ]
        if not curves:
            continue
        axis: dict[str, Any] = {"doubling": True, "level": 1} if path == RATIO else {"from_zero": True}
        ends = list(_ends(named, path))
        words = "The mean over layers, in each pass over the same samples." + " 1 is balance." * (path == RATIO)
        drawing = draw_lines(curves, "step", y, **axis)
        figures.append(Figure(f"{title} by step", words, drawing))
        words = "Each layer in the first pass and, dashed and hollow, in the last."
        drawing = draw_lines(ends, "decoder layer", y, **axis)
        figures.append(Figure(f"{title} by layer", words, drawing))
    return Section(
        title="During training",
        source="What --steering_diagnostics_steps measured between the steps of trainings, on a few samples that stay "
        "the same; docs/diagnostics.md, section During training.",
        findings=[*(text for run in runs for text in _findings(run)), *differences(runs)],
        limits=[
            "A curve over a few samples shows a direction and no significance: measure the finished adapter with "
            "llava-steering diagnose.",
            "Drawn from the training data, the samples are ones that the adapter learns.",
        ],
        settings=[settings_table(runs)],
        figures=figures,
        tables=[_table(run) for run in runs],
    )


def _at(line: Mapping[str, Any], path: Path) -> Mapping[str, Any] | None:
    """Return a part of a pass; None if its mode has it not."""
    found: Any = line
    for key in path:
        found = found.get(key)
        if found is None:
            return None
    return dict(found)


def _curve(run: Run, path: Path) -> list[tuple[float, float | None]]:
    """Return step and mean over layers of each pass that measured a quantity."""
    found = []
    for line in run.document["passes"]:
        part, step = _at(line, path), number(line["step"])
        if part is not None and step is not None:
            found.append((step, number(part["mean"])))
    return found


def _ends(named: Sequence[tuple[str, Run]], path: Path) -> Iterator[Line]:
    """Yield a line by layer for the first and the last pass of each training."""
    for look, (name, run) in enumerate(named):
        parts = [(line["step"], part) for line in run.document["passes"] if (part := _at(line, path)) is not None]
        for variant, (step, part) in enumerate([*parts[:1], *parts[1:][-1:]]):
            layers = numbers(part["layers"])
            yield Line(f"{name}, step {step}", range(len(layers)), layers, look=look, variant=variant)


def _findings(run: Run) -> Iterator[str]:
    """Say how each quantity began and ended."""
    for path, (title, _) in QUANTITIES.items():
        known = [(step, value) for step, value in _curve(run, path) if value is not None]
        if known:
            (begin, first), (end, last) = known[0], known[-1]
            yield (
                f"{title} of {run.label}, the mean over layers: {written(first)} at step {begin:.0f}, {written(last)} "
                f"at step {end:.0f}."
            )


def _table(run: Run) -> Table:
    columns = {title: dict(_curve(run, path)) for path, (title, _) in QUANTITIES.items()}
    columns = {title: column for title, column in columns.items() if column}
    steps = sorted({step for column in columns.values() for step in column})
    rows = [[f"{step:.0f}", *(written(column.get(step)) for column in columns.values())] for step in steps]
    return Table(f"Means over layers, {run.label}", ["step", *columns], rows)
