"""The section on attention to image and text, from modality.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llava_steering_plugin.diagnostics.report.lines import MANY_LINES, Line, draw_lines
from llava_steering_plugin.diagnostics.report.maps import draw_map
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
    numbers,
    settings_table,
    short_names,
    written,
)

ALL_TEXT = "all text"
AXIS = "attention ratio"
WIDEST = 10  # powers of two on each side of 1 in the maps of heads


def modality_section(runs: Sequence[Run]) -> Section:
    """Return what a report says of modality.json, the models of all runs in the same figures.

    Raises:
        KeyError, TypeError, ValueError: a document has another form.
    """
    models = models_of(runs)
    texts = list(dict.fromkeys(text for _, model in models for text in model["lmar"]))
    short = short_names([name for name, _ in models])
    drawn = [(name, model) for name, (_, model) in zip(short, models, strict=True)]
    bands = "; bands are 95 % bootstrap intervals" if len(models) <= MANY_LINES else ""
    ratios = {text: _by_layer(drawn, "lmar", text) for text in texts}
    every = [line for lines in ratios.values() for line in lines]
    figures = [
        Figure(
            f"Attention ratio by layer, {text}",
            f"What an image token gets of the attention, divided by what a text token gets. 1 is balance{bands}.",
            draw_lines(lines, "decoder layer", AXIS, doubling=True, beside=every, level=1),
        )
        for text, lines in ratios.items()
    ]
    share = draw_lines(_by_layer(drawn, "shares", "image"), "decoder layer", "share of the attention", scale=(0, 1))
    words = f"The part of all attention that goes to the image{bands}."
    figures.insert(1, Figure("The image's share of the attention", words, share))
    return Section(
        title="Attention to image and text",
        source="The layer-wise modality attention ratio of LLaVA Steering (arXiv 2412.12359, eq. 2) while a model "
        "answers; docs/diagnostics.md, section Modality attention.",
        findings=[*_findings(models), *differences(runs)],
        limits=[
            "Attention need not explain an answer: a token that gets much of it may change nothing.",
            "The ratio is a mean of ratios, as the paper has it: a few answers that hardly attend to the text can make "
            "it large. The image's share of the attention stays between 0 and 1.",
            "The ratio compares models on the same questions; its height also depends on how many tokens an image has.",
        ],
        settings=[
            models_table(runs, {"answers": "answers", "left_out": "questions left out", "tokens": "mean tokens"}),
            settings_table(runs),
        ],
        figures=[*figures, *_heads(drawn)],
        tables=[
            _over_layers(models, texts),
            _layers(models, "lmar", ALL_TEXT, f"Attention ratio, {ALL_TEXT}, with 95 % intervals"),
            _layers(models, "shares", "image", "The image's share of the attention, with 95 % intervals"),
        ],
    )


def _by_layer(models: Sequence[tuple[str, Mapping[str, Any]]], quantity: str, of: str) -> list[Line]:
    lines = []
    for look, (name, model) in enumerate(models):
        values = model[quantity].get(of, {"mean": [], "low": [], "high": []})
        means, low, high = (numbers(values[key]) for key in ("mean", "low", "high"))
        lines.append(Line(name, range(len(means)), means, low, high, look))
    return lines


def _findings(models: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Say what was measured: a sentence on each model, or one on all if there are many."""
    averages = {name: mean(numbers(model["lmar"][ALL_TEXT]["mean"])) for name, model in models}
    known = sorted((value, name) for name, value in averages.items() if value is not None)
    found = [f"Of {name}, no answer could be measured." for name, value in averages.items() if value is None]
    if len(known) > MANY_LINES:
        (low, first), (high, last) = known[0], known[-1]
        found.append(
            f"Averaged over layers, an image token gets {written(low)} ({first}) to {written(high)} ({last}) times the "
            f"attention of a text token, in {len(known)} models. The first table below has a row for each."
        )
        return found
    return [*found, *(_finding(name, model) for name, model in models if averages[name] is not None)]


def _finding(name: str, model: Mapping[str, Any]) -> str:
    """Say what was measured of one model."""
    means, low, high = (numbers(model["lmar"][ALL_TEXT][key]) for key in ("mean", "low", "high"))
    defined = [value for value in means if value is not None]
    text = (
        f"Averaged over layers, {name} gives an image token {written(mean(means))} times the attention of a text token "
        f"(layers: {written(min(defined))} to {written(max(defined))}; answers: {model['answers']}). Of all its "
        f"attention, {written(mean(numbers(model['shares']['image']['mean'])))} goes to the image."
    )
    if any(value is not None for value in low):
        above = sum(value is not None and value > 1 for value in low)
        below = sum(value is not None and value < 1 for value in high)
        text += f" The interval lies below 1 in {below} of {len(means)} layers, and above 1 in {above}."
    return text


def _heads(models: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Figure]:
    """Draw the ratio of every head, on one scale for all models."""
    ratios = {name: matrix(model["lmar_by_head"]) for name, model in models if model.get("lmar_by_head")}
    logs = {name: [[_log2(value) for value in row] for row in rows] for name, rows in ratios.items()}
    sizes = [abs(value) for rows in logs.values() for row in rows for value in row if value is not None]
    limit = min(WIDEST, max(1, math.ceil(max(sizes, default=1))))
    step = math.ceil(limit / 4)
    ticks = {float(power): f"{2.0**power:.4g}" for power in range(-(limit // step) * step, limit + 1, step)}
    figures = []
    for name, rows in ratios.items():
        heads = max(map(len, rows), default=0)
        drawing = draw_map(
            logs[name],
            [str(head) for head in range(heads)],
            [str(layer) for layer in range(len(rows))],
            x="head",
            y="layer",
            scale=(-limit, limit),
            ticks=ticks,
            words=[[written(value) for value in row] for row in rows],
        )
        words = f"The ratio of every head ({ALL_TEXT}). Orange: more for an image token; purple: more for a text token."
        figures.append(Figure(f"Attention ratio by head: {name}", words, drawing))
    return figures


def _log2(value: float | None) -> float | None:
    return math.log2(value) if value is not None and value > 0 else None


def _over_layers(models: Sequence[tuple[str, Mapping[str, Any]]], texts: Sequence[str]) -> Table:
    rows = [
        [
            name,
            *(written(mean(numbers(model["lmar"].get(text, {"mean": []})["mean"]))) for text in texts),
            written(mean(numbers(model["shares"]["image"]["mean"]))),
        ]
        for name, model in models
    ]
    heads = [f"ratio, {text}" for text in texts]
    return Table("Averages over layers", ["model", *heads, "image's share"], rows)


def _layers(models: Sequence[tuple[str, Mapping[str, Any]]], quantity: str, of: str, caption: str) -> Table:
    """Return the numbers by layer, a column for each model."""
    columns = []
    for _, model in models:
        values = model[quantity][of]
        low, means, high = (numbers(values[key]) for key in ("low", "mean", "high"))
        columns.append([between(*each) for each in zip(low, means, high, strict=True)])
    layers = range(max(map(len, columns), default=0))
    rows = [[str(layer), *(column[layer] if layer < len(column) else "" for column in columns)] for layer in layers]
    return Table(caption, ["layer", *(name for name, _ in models)], rows)
