"""The section on interference between tasks, from interference.json."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from llava_steering_plugin.diagnostics.report.lines import Line, draw_lines
from llava_steering_plugin.diagnostics.report.maps import draw_map
from llava_steering_plugin.diagnostics.report.parts import (
    NONE,
    Figure,
    Run,
    Section,
    Table,
    differences,
    matrix,
    mean,
    models_of,
    models_table,
    settings_table,
    short_names,
    written,
)

SIDES = {"all": "all parameters", "A": "factors A", "B": "factors B", "routers": "routers"}
LONGEST_TASK = 18  # characters of its name beside a map
SHOWN = "ratio_of_means"
KINDS = {"ratio_of_means": "ratio of means", "mean_of_ratios": "mean of ratios", "ratio_of_means_shared": "shared only"}
Model = tuple[str, Sequence[str], Mapping[str, Any]]


def interference_section(runs: Sequence[Run]) -> Section:
    """Return what a report says of interference.json: a row of maps for each model, all on one scale.

    Raises:
        KeyError, TypeError, ValueError: a document has another form.
    """
    tasks = [[str(task) for task in run.document["tasks"]] for run in runs for _ in run.document["models"]]
    models = [(name, own, model) for own, (name, model) in zip(tasks, models_of(runs), strict=True)]
    return Section(
        title="Interference between tasks",
        source="Task interference of Conditional Mixture of LoRA (arXiv 2402.15896, section 2), as a ratio of means; "
        "docs/diagnostics.md, section Task interference. 1: a step for one task lowers the loss of the other as much "
        "as its own step does; 0: it does nothing; below 0: it harms. In the maps, orange helps and purple harms; "
        "beyond -1 and 1 the colour stays the same.",
        findings=[*(_finding(*model) for model in models), *differences(runs)],
        limits=[
            "It describes one state of the adapter and steps that are infinitely small.",
            "It looks at gradients, not at accuracy: two tasks with a negative number may both still improve.",
        ],
        settings=[
            models_table(runs, {"samples": "samples of each task", "conversation": "conversation"}),
            settings_table(runs),
        ],
        figures=[*(figure for model in models for figure in _maps(*model)), *_by_layer(models)],
        tables=[_table(*model) for model in models],
    )


def _pairs(values: Sequence[Sequence[float | None]]) -> list[tuple[int, int, float]]:
    """Return what stands beside the diagonal: the task of the loss, the task of the step, the value."""
    places = ((i, j, value) for i, row in enumerate(values) for j, value in enumerate(row))
    return [(i, j, value) for i, j, value in places if i != j and value is not None]


def _finding(name: str, tasks: Sequence[str], model: Mapping[str, Any]) -> str:
    """Say what was measured of one model, over all of its parameters."""
    pairs = _pairs(matrix(model["sides"]["all"][SHOWN]))
    if not pairs:
        return f"Of {name}, no pair of tasks could be measured."
    i, j, lowest = min(pairs, key=lambda pair: pair[2])
    negative = sum(value < 0 for *_, value in pairs)
    average = mean([value for *_, value in pairs])
    return (
        f"Over all parameters of {name}, the mean over pairs of different tasks is {written(average)}; {negative} of "
        f"{len(pairs)} are negative. The lowest is {written(lowest)}: a step for {tasks[j]}, on the loss of {tasks[i]}."
    )


def _maps(name: str, tasks: Sequence[str], model: Mapping[str, Any]) -> list[Figure]:
    figures = []
    (short,) = short_names([name])
    labels = short_names(tasks, LONGEST_TASK)
    for side in dict.fromkeys([*SIDES, *model["sides"]]):
        if side not in model["sides"]:
            continue
        values = matrix(model["sides"][side][SHOWN])
        drawing = draw_map(
            values,
            labels,
            labels,
            x="step for",
            y="loss of",
            scale=(-1, 1),
            ticks={place: f"{place:g}" for place in (-1, -0.5, 0, 0.5, 1)},
            words=[[NONE if value is None else f"{value:.2f}" for value in row] for row in values],
        )
        what = SIDES.get(side, side)
        words = "The effect of a step for one task (columns) on the loss of another (rows)."
        figures.append(Figure(f"{short}: {what}", words, drawing))
    return figures


def _by_layer(models: Sequence[Model]) -> list[Figure]:
    """Draw the mean over pairs of tasks by layer, for the factors of each side."""
    lines = []
    for look, (short, (_, _, model)) in enumerate(zip(short_names([name for name, *_ in models]), models, strict=True)):
        found: dict[str, dict[int, list[float | None]]] = defaultdict(lambda: defaultdict(list))
        for group, kinds in model["groups"].items():
            layer, _, rest = group.partition(" ")
            side = rest.rpartition(" ")[2]
            if layer.isdecimal() and side in SIDES:
                found[side][int(layer)] += [value for *_, value in _pairs(matrix(kinds[SHOWN]))]
        for variant, side in enumerate(side for side in SIDES if side in found):
            layers = sorted(found[side])
            means = [mean(found[side][layer]) for layer in layers]
            lines.append(Line(f"{short}, {SIDES[side]}", layers, means, look=look, variant=variant))
    if not lines:
        return []
    words = "For each layer, the mean over pairs of different tasks and over the layer's linears. Below 0 is harm."
    return [Figure("Mean interference by layer", words, draw_lines(lines, "decoder layer", "interference", level=0))]


def _table(name: str, tasks: Sequence[str], model: Mapping[str, Any]) -> Table:
    """Return all matrices of a model's sides, a row for each pair of tasks."""
    rows = []
    for side, kinds in model["sides"].items():
        found = {kind: matrix(kinds[kind]) for kind in KINDS if kind in kinds}
        for i, of in enumerate(tasks):
            for j, step in enumerate(tasks):
                values = (written(found[kind][i][j]) if kind in found else NONE for kind in KINDS)
                rows.append([SIDES.get(side, side), of, step, *values])
    return Table(f"Interference in {name}", ["parameters", "loss of", "step for", *KINDS.values()], rows)
