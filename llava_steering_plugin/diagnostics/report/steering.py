"""The section on the steering of MoReS adapters, from steering.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_steering_plugin.diagnostics.report.lines import MANY_LINES, Line, draw_lines
from llava_steering_plugin.diagnostics.report.maps import draw_shares
from llava_steering_plugin.diagnostics.report.parts import (
    NONE,
    Figure,
    Run,
    Section,
    Table,
    between,
    differences,
    layer_numbers,
    matrix,
    models_of,
    models_table,
    number,
    numbers,
    settings_table,
    short_names,
    written,
)

MODALITIES = {"vis": "image tokens", "text": "text tokens"}
Named = Sequence[tuple[str, Mapping[str, Any]]]


def steering_section(runs: Sequence[Run]) -> Section:
    """Return what a report says of steering.json, the adapters of all runs in the same figures.

    Raises:
        KeyError, TypeError, ValueError: a document has another form.
    """
    models = models_of(runs)
    short = short_names([name for name, _ in models])
    drawn = [(name, model) for name, (_, model) in zip(short, models, strict=True)]
    return Section(
        title="Steering by layer",
        source="What MoReS adds to the hidden states (LLaVA Steering, arXiv 2412.12359, eq. 3-4), and the loss that is "
        "added where one layer does not steer; docs/diagnostics.md, section Steering.",
        findings=[*(_finding(name, model) for name, model in models), *differences(runs)],
        limits=[
            "A layer that costs nothing alone may matter once another is off, and an interval that holds 0 may only be "
            "wide.",
            "With the adapter's own answers, the loss says how sure it is of them, not whether they are right.",
            "A large update may be one that the next norm takes away.",
        ],
        settings=[models_table(runs, {"answers": "answers", "left_out": "left out"}), settings_table(runs)],
        figures=[*_by_layer(drawn), *_cosines(drawn), *_pairs(runs)],
        tables=[_table(name, model) for name, model in models],
    )


def _finding(name: str, model: Mapping[str, Any]) -> str:
    """Say what was measured of one adapter."""
    layers, cost, whole = layer_numbers(model["layers"]), model["cost"], model["cost_of_all"]
    known = [(value, layer) for value, layer in zip(numbers(cost["mean"]), layers, strict=False) if value is not None]
    if not known:
        return f"Of {name}, no answer could be measured."
    most, costliest = max(known)
    text = (
        f"Where no layer steers, the loss of {name} changes by {_of(whole)}, from {_of(model['loss']['on'])} (answers: "
        f"{model['answers']}). Of single layers, layer {costliest} costs most: {written(most)}. "
    )
    if any(value is not None for value in numbers(cost["low"])):
        none = len(model["no_cost_seen"])
        text += f"In {none} of {len(layers)} layers, the interval of the cost reaches 0 or lies below. "
    for modality, norms in model["norms"].items():
        sizes = [(value, n) for value, n in zip(numbers(norms["mean"]), layers, strict=False) if value is not None]
        if sizes:
            largest, layer = max(sizes)
            average = sum(value for value, _ in sizes) / len(sizes)
            text += (
                f"The update of {MODALITIES.get(modality, modality)} has {written(average)} times the size of the "
                f"hidden state, averaged over layers; the most, {written(largest)}, in layer {layer}. "
            )
    return text.rstrip()


def _of(values: Mapping[str, Any]) -> str:
    return between(*(number(values[key]) for key in ("low", "mean", "high")))


def _by_layer(models: Named) -> list[Figure]:
    """Draw the sizes and the costs."""
    sizes, costs = [], []
    for look, (name, model) in enumerate(models):
        several = len(model["norms"]) > 1
        for modality, norms in model["norms"].items():
            label = f"{name}, {modality}" if several else name
            variant = list(MODALITIES).index(modality) if several and modality in MODALITIES else None
            sizes.append(_line(label, model["layers"], norms, look, variant))
        costs.append(_line(name, model["layers"], model["cost"], look, None))
    bands = "; bands are 95 % bootstrap intervals" if len(sizes) <= MANY_LINES else ""
    return [
        Figure(
            "Size of the update",
            f"The length of what is added to a token's hidden state, relative to that state{bands}.",
            draw_lines(sizes, "decoder layer", "relative size", from_zero=True),
        ),
        Figure(
            "Cost of a layer",
            f"The loss that is added when this layer alone does not steer. The dashed line is no change{bands}.",
            draw_lines(costs, "decoder layer", "added loss", level=0),
        ),
    ]


def _line(name: str, layers: Any, values: Mapping[str, Any], look: int, variant: int | None) -> Line:
    means, low, high = (numbers(values[key]) for key in ("mean", "low", "high"))
    return Line(name, layer_numbers(layers)[: len(means)], means, low, high, look, variant)


def _cosines(models: Named) -> list[Figure]:
    """Draw how alike the subspaces of the layers are."""
    figures = []
    for name, model in models:
        labels = [str(layer) for layer in model["layers"]]
        for modality, values in model["cosines"].items():
            rows = matrix(values)
            chance = written(number(model["cosines_by_chance"][modality]))
            drawing = draw_shares(
                rows,
                labels,
                labels,
                x="layer",
                y="layer",
            )
            words = (
                "Mean cosine of the principal angles between the subspaces of two layers: 1 if one holds the other, "
                f"0 if they are orthogonal, {chance} by chance."
            )
            title = f"Directions of {name}, {MODALITIES.get(modality, modality)}"
            figures.append(Figure(title, words, drawing))
    return figures


def _pairs(runs: Sequence[Run]) -> list[Figure]:
    """Draw how alike the subspaces of two adapters are."""
    pairs = [pair for run in runs for pair in run.document["pairs"]]
    names = short_names([f"{pair['models'][0]}, {pair['models'][1]}: {pair['modality']}" for pair in pairs], 48)
    lines = [
        Line(name, layer_numbers(pair["layers"]), numbers(pair["mean"]), look=look)
        for look, (name, pair) in enumerate(zip(names, pairs, strict=True))
    ]
    if not lines:
        return []
    chances = sorted({written(number(pair["by_chance"])) for pair in pairs})
    words = (
        "Mean cosine of the principal angles between the subspaces of two adapters in the same layer; by chance it is "
        f"{' or '.join(chances)}."
    )
    drawing = draw_lines(lines, "decoder layer", "mean cosine", scale=(0, 1.02))
    return [Figure("Directions that two adapters share", words, drawing)]


def _table(name: str, model: Mapping[str, Any]) -> Table:
    layers = model["layers"]
    cost = [
        between(*each) for each in zip(*(numbers(model["cost"][key]) for key in ("low", "mean", "high")), strict=True)
    ]
    columns = {"added loss when off": cost}
    for modality, norms in model["norms"].items():
        what = MODALITIES.get(modality, modality)
        if modality in model.get("tokens", {}):  # earlier versions did not write them
            columns[f"steered {what}"] = [str(spec) for spec in model["tokens"][modality]]
        sizes = zip(*(numbers(norms[key]) for key in ("low", "mean", "high")), strict=True)
        columns[f"relative size, {what}"] = [between(*each) for each in sizes]
        columns[f"spread over tokens, {what}"] = [written(value) for value in numbers(norms["spread_tokens"])]
    rows = [
        [str(layer), *(column[at] if at < len(column) else NONE for column in columns.values())]
        for at, layer in enumerate(layers)
    ]
    return Table(f"Steering of {name} by layer, with 95 % intervals", ["layer", *columns], rows)
