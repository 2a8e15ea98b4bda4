"""The section on comparisons of methods, from the results.json of `llava-steering compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_steering_plugin.diagnostics.report.parts import (
    NONE,
    Figure,
    Run,
    Section,
    Table,
    number,
    short_names,
    shown,
    written,
)
from llava_steering_plugin.diagnostics.report.points import Dot, draw_dots

COSTS = {
    "trained_parameters": "trained parameters",
    "projector_parameters": "and of the projector",
    "file_bytes": "bytes of the file",
    "step_ratio": "training step / frozen pass",
    "answer_ratio": "answer / frozen",
    "peak_bytes": "peak bytes",
}
Task = Mapping[str, Any]


def comparison_section(runs: Sequence[Run]) -> Section:
    """Return what a report says of results.json, a figure and tables for each task.

    Raises:
        KeyError, TypeError, ValueError: a document has another form.
    """
    tasks = [
        (str(task["task"]) if len(runs) == 1 else f"{task['task']} ({run.label})", task)
        for run in runs
        for task in run.document["tasks"]
    ]
    return Section(
        title="Comparison of methods",
        source="What `llava-steering compare` measured (docs/comparing.md): scores over seeds at the learning rate "
        "that the validation split has chosen, and differences that are paired by seed and question, with 95 % "
        "bootstrap intervals over both.",
        findings=[
            *(finding for name, task in tasks for finding in _findings(name, task)),
            *(lost for run in runs if (lost := _lost(run))),
        ],
        limits=[
            "An interval that holds 0 does not show that two methods are equal, and one of two or three seeds is too "
            "narrow.",
            "Times are of one machine in one run.",
        ],
        settings=[_settings(runs)],
        figures=[
            figure
            for name, task in tasks
            for test in task["tests"]
            if (figure := _figure(name, task, test)) is not None
        ],
        tables=[
            *(_scores(name, task) for name, task in tasks),
            *(_costs(name, task) for name, task in tasks),
            *(_tried(name, task) for name, task in tasks if task["tried"]),
            *(_ended(run) for run in runs if run.document["ended"]),
        ],
    )


def _findings(name: str, task: Task) -> list[str]:
    found = []
    for test in task["tests"]:
        outcomes = [(str(one["method"]), one["outcomes"][test]) for one in task["methods"]]
        scored = [(mean, method) for method, one in outcomes if (mean := _mean(one["score"])) is not None]
        if not scored:
            found.append(f"{name}, {test}: no method has a result.")
            continue
        best, method = max(scored)
        clear = [
            f"{other} {_difference(one['difference'])}"
            for other, one in outcomes
            if one["difference"] is not None and _excludes_zero(one["difference"])
        ]
        text = f"{name}, {test}: {method} has the highest mean, {written(best)}."
        compared = sum(one["difference"] is not None for _, one in outcomes)
        if compared:
            ends = f": {'; '.join(clear)}" if clear else ""
            text += f" Of {compared} differences from {task['reference']}, the interval of {len(clear)} does not hold 0"
            text += f"{ends}."
        found.append(text)
    return found


def _mean(spread: Mapping[str, Any] | None) -> float | None:
    return None if spread is None else number(spread["mean"])


def _excludes_zero(difference: Mapping[str, Any]) -> bool:
    low, high = number(difference["low"]), number(difference["high"])
    return low is not None and high is not None and (low > 0 or high < 0)


def _difference(difference: Mapping[str, Any] | None) -> str:
    """Return a difference in points with its interval."""
    if difference is None:
        return NONE
    low, mean, high = (number(difference[key]) for key in ("low", "mean", "high"))
    ends = "" if low is None or high is None else f" ({low:+.1f} to {high:+.1f})"
    return NONE if mean is None else f"{mean:+.1f}{ends}"


def _lost(run: Run) -> str:
    ended, cells = run.document["ended"], run.document["cells"]
    return f"{len(ended)} of the {cells} cells of {run.label} have no result; a table names them." if ended else ""


def _figure(name: str, task: Task, test: str) -> Figure | None:
    """Draw scores against trained parameters; None: no trained method has one."""
    methods = [one for one in task["methods"] if not one["frozen"]]
    short = short_names([str(one["method"]) for one in methods])
    dots = []
    for look, (label, one) in enumerate(zip(short, methods, strict=True), 1):
        score, costs = one["outcomes"][test]["score"], one["costs"]
        if score is None or costs is None:
            continue
        parameters = int(costs["trained_parameters"]) + int(costs["projector_parameters"])
        dots.append(Dot(label, max(parameters, 1), _mean(score), number(score["deviation"]), look))
    if not dots:
        return None
    base = next((_mean(one["outcomes"][test]["score"]) for one in task["methods"] if one["frozen"]), None)
    words = (
        "The mean over seeds with its standard deviation, against trained parameters, those of the projector included."
        + ("" if base is None else " Dashed: the frozen model.")
    )
    title = name if len(task["tests"]) == 1 else f"{name}: {test}"
    return Figure(title, words, draw_dots(dots, "trained parameters", "score", level=base))


def _scores(name: str, task: Task) -> Table:
    head = ["method", "learning rate", "seeds"]
    for test in task["tests"]:
        head += [str(test), f"from {task['reference']}"]
    rows = []
    for one in task["methods"]:
        cells = [str(one["method"]), written(number(one["rate"])), f"{len(one['done'])} of {len(one['seeds'])}"]
        for test in task["tests"]:
            outcome = one["outcomes"][test]
            reference = one["method"] == task["reference"]
            cells += [_spread(outcome["score"]), "reference" if reference else _difference(outcome["difference"])]
        rows.append(cells)
    return Table(f"Scores of {name}", head, rows)


def _spread(spread: Mapping[str, Any] | None) -> str:
    mean, deviation = _mean(spread), None if spread is None else number(spread["deviation"])
    if mean is None:
        return NONE
    return f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def _costs(name: str, task: Task) -> Table:
    rows = [
        [str(one["method"]), *(NONE if one["costs"] is None else _cost(one["costs"][key]) for key in COSTS)]
        for one in task["methods"]
    ]
    return Table(f"Costs of {name}", ["method", *COSTS.values()], rows)


def _cost(value: Any) -> str:
    return f"{value:,}" if type(value) is int else written(number(value))


def _tried(name: str, task: Task) -> Table:
    tests = [str(test) for test in task["validation_tests"]]
    rows = [
        [
            str(one["method"]),
            written(number(one["rate"]) or None),
            "yes" if one["chosen"] else "",
            f"{one['done']} of {one['seeds']}",
            str(one["diverged"]),
            *(_spread(one["scores"][test]) for test in tests),
        ]
        for one in task["tried"]
    ]
    head = ["method", "learning rate", "chosen", "seeds", "diverged", *tests]
    return Table(f"Validation of {name}", head, rows)


def _ended(run: Run) -> Table:
    keys = ("task", "method", "rate", "seed", "status", "error")
    rows = [[shown(one[key]) for key in keys] for one in run.document["ended"]]
    return Table(
        f"Cells of {run.label} without a result", ["task", "method", "learning rate", "seed", "status", "why"], rows
    )


def _settings(runs: Sequence[Run]) -> Table:
    rows = [["file", *(", ".join(run.files) for run in runs)]]
    for key, title in (("began", "began"), ("ended_at", "ended"), ("cells", "cells"), ("reference", "reference")):
        rows.append([title, *(shown(run.document[key]) for run in runs)])
    rows.append(["commit", *(shown(list(run.document["commits"])) for run in runs)])
    packages = dict.fromkeys(package for run in runs for package in run.document["versions"])
    rows += [[package, *(shown(run.document["versions"].get(package)) for run in runs)] for package in packages]
    return Table("Comparisons", ["", *(run.label for run in runs)], rows)
