"""The section on the choices of MixLoRA adapters, from routing.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_steering_plugin.diagnostics.report.lines import Line, draw_lines
from llava_steering_plugin.diagnostics.report.maps import draw_shares
from llava_steering_plugin.diagnostics.report.parts import (
    Figure,
    Run,
    Section,
    Table,
    between,
    differences,
    matrix,
    mean,
    models_of,
    models_table,
    number,
    numbers,
    settings_table,
    short_names,
    written,
)
from llava_steering_plugin.diagnostics.report.points import Interval, draw_plane, draw_points

# What takes the place of the routers' choices: as a sentence says it, and as it stands below a figure.
VARIANTS = {
    "shuffled": ("those of another sample", "another<br>sample's"),
    "shuffled_within_task": ("those of another sample of the same task", "another's of<br>the same task"),
    "most_frequent": ("the most frequent ones", "most<br>frequent"),
    "random": ("random ones", "random"),
}
QUANTITIES = {
    "mutual_information": "Adjusted mutual information of choice and task",
    "entropy": "Entropy of the factors' use",
}
ALL = "over all"
SIDES = ("A", "B")
LONGEST_TASK = 18
Named = Sequence[tuple[str, Mapping[str, Any]]]


def routing_section(runs: Sequence[Run]) -> Section:
    """Return what a report says of routing.json, the adapters of all runs on the same scales.

    Raises:
        KeyError, TypeError, ValueError: a document has another form.
    """
    models = models_of(runs)
    short = short_names([name for name, _ in models])
    drawn = [(name, model) for name, (_, model) in zip(short, models, strict=True)]
    maps = [figure for name, model in drawn for figure in (*_use(name, model), *_overlap(name, model))]
    columns = {"factors": "factors", "chosen": "chosen", "selection": "selection", "samples": "samples"}
    return Section(
        title="Routing",
        source="Which factors MixLoRA chooses (Conditional Mixture of LoRA, arXiv 2402.15896, section 3), and what its "
        "choices are worth; docs/diagnostics.md, section Routing.",
        findings=[*(_finding(name, model) for name, model in models), *differences(runs)],
        limits=[
            "A loss with other choices shows what these factors need, which were trained with their router. It does "
            "not say what an adapter without a router would reach.",
            "Tasks whose prompts differ are easy to tell apart: information about the task is no proof that the choice "
            "helps.",
            "t-SNE keeps neighbours, not distances, and a few samples fall into clusters of no meaning.",
        ],
        settings=[models_table(runs, {**columns, "left_out": "left out", "notes": "notes"}), settings_table(runs)],
        figures=[*_worth(drawn), *_by_layer(drawn), *maps, *_planes(drawn)],
        tables=[table for name, model in models for table in (_worth_table(name, model), _places_table(name, model))],
    )


def _finding(name: str, model: Mapping[str, Any]) -> str:
    """Say what was measured of one adapter."""
    lost = [
        f"{_of(model['forced'][variant]['over_all']['loss_added'])} with {words}"
        for variant, (words, _) in VARIANTS.items()
        if variant in model["forced"]
    ]
    own = model["own"]["over_all"]
    text = (
        f"With its own choices, {name} has a loss of {_of(own['loss'])} and an accuracy of {_of(own['accuracy'])} on "
        f"the answers' tokens. The loss that other choices add: {'; '.join(lost)}."
    )
    for side in SIDES:
        found = model["sides"][side]
        told = number(found["mutual_information"])
        text += f" {side} uses its factors with an entropy of {written(number(found['entropy']))}"
        text += "." if told is None else f", and its adjusted mutual information with the task is {written(told)}."
    return text


def _of(values: Mapping[str, Any]) -> str:
    return between(*_interval(values))


def _interval(values: Mapping[str, Any] | None) -> Interval:
    if values is None:
        return None, None, None
    return number(values["low"]), number(values["mean"]), number(values["high"])


def _worth(models: Named) -> list[Figure]:
    """Draw the loss that other choices add, for each adapter on one scale."""
    found: list[tuple[str, list[str], dict[str, list[Interval]]]] = []
    for name, model in models:
        variants = [variant for variant in VARIANTS if variant in model["forced"]]
        forced = [model["forced"][variant] for variant in variants]
        series = {ALL: [_interval(each["over_all"]["loss_added"]) for each in forced]}
        tasks = list(dict.fromkeys(task for each in forced for task in each["tasks"]))
        if len(tasks) > 1:
            for label, task in zip(short_names(tasks), tasks, strict=True):
                series[label] = [_interval(each["tasks"].get(task, {}).get("loss_added")) for each in forced]
        found.append((name, variants, series))
    ends = [
        end for *_, series in found for values in series.values() for each in values for end in each if end is not None
    ]
    low, high = min([0, *ends]), max([0, *ends])
    room = (high - low) * 0.05 or 1
    words = "The loss that is added when other choices replace the routers'; 95 % bootstrap intervals."
    return [
        Figure(
            f"What the choices of {name} are worth",
            words,
            draw_points(
                series, [VARIANTS[variant][1] for variant in variants], "added loss", scale=(low - room, high + room)
            ),
        )
        for name, variants, series in found
    ]


def _by_layer(models: Named) -> list[Figure]:
    """Draw what choices tell, and how evenly they use the factors, by layer."""
    figures = []
    for quantity, title in QUANTITIES.items():
        lines = []
        for look, (name, model) in enumerate(models):
            for variant, side in enumerate(SIDES):
                found = [place for place in model["places"] if place["side"] == side]
                layers = sorted({int(place["layer"]) for place in found})
                means = [
                    mean([number(place[quantity]) for place in found if place["layer"] == layer]) for layer in layers
                ]
                if any(value is not None for value in means):
                    lines.append(Line(f"{name}, {side}", layers, means, look=look, variant=variant))
        if lines:
            words = "The mean over a layer's linears, for the factors A and B."
            drawing = draw_lines(lines, "decoder layer", quantity.replace("_", " "), scale=(-0.05, 1.05))
            figures.append(Figure(title, words, drawing))
    return figures


def _use(name: str, model: Mapping[str, Any]) -> list[Figure]:
    """Draw how often each factor is chosen, a row for each linear."""
    figures = []
    for side in SIDES:
        places = [place for place in model["places"] if place["side"] == side]
        rows = [numbers(place["use"]) for place in places]
        drawing = draw_shares(
            rows,
            [str(factor) for factor in range(max(map(len, rows), default=0))],
            [f"{place['layer']} {place['linear']}" for place in places],
            x="factor",
            y="linear",
        )
        words = "The share of samples that choose a factor, for every linear (its layer and name)."
        figures.append(Figure(f"Use of the factors {side}: {name}", words, drawing))
    return figures


def _overlap(name: str, model: Mapping[str, Any]) -> list[Figure]:
    """Draw how much two tasks choose alike."""
    figures = []
    tasks = short_names(list(model["samples"]), LONGEST_TASK)
    for side, values in (model["overlap"] or {}).items():
        rows = matrix(values)
        drawing = draw_shares(
            rows,
            tasks,
            tasks,
            x="task",
            y="task",
        )
        words = "1: two tasks choose every factor as often; 0: no factor is chosen by both. The mean over linears."
        figures.append(Figure(f"Overlap of tasks, factors {side}: {name}", words, drawing))
    return figures


def _planes(models: Named) -> list[Figure]:
    """Draw the samples as t-SNE placed them."""
    figures = []
    for name, model in models:
        for side, planes in (model["embeddings"] or {}).items():
            for what, points in planes.items():
                if points is None:
                    continue
                tasks = [str(task) for task in model["points"]]
                every = list(dict.fromkeys(tasks))
                groups = {
                    label: [point for point, its in zip(matrix(points), tasks, strict=True) if its == task]
                    for label, task in zip(short_names(every), every, strict=True)
                }
                words = f"Every point is a sample; near points have alike {what}. The axes mean nothing."
                figures.append(Figure(f"t-SNE of the {what}, factors {side}: {name}", words, draw_plane(groups)))
    return figures


def _worth_table(name: str, model: Mapping[str, Any]) -> Table:
    rows = []
    for variant, found in {"own": model["own"], **model["forced"]}.items():
        for task, values in {ALL: found["over_all"], **found["tasks"]}.items():
            loss, accuracy = values.values()
            rows.append([variant.replace("_", " "), task, _of(loss), _of(accuracy)])
    heads = ["choices", "task", "loss (own), loss added", "accuracy (own), accuracy lost"]
    return Table(f"What the choices of {name} are worth, with 95 % intervals", heads, rows)


def _places_table(name: str, model: Mapping[str, Any]) -> Table:
    keys = ("entropy", "overlap", "mutual_information")
    rows = [
        [f"{place['layer']} {place['linear']}", str(place["side"]), *(written(number(place[key])) for key in keys)]
        for place in model["places"]
    ]
    return Table(f"The choices of {name} by linear", ["linear", "side", *(key.replace("_", " ") for key in keys)], rows)
