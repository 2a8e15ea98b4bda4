"""Draw the steering of adapters from its JSON alone: sizes and costs by layer, and cosines between subspaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_steering_plugin.figures import look_of, new_figure, save_figure

MAPS_IN_A_ROW = 3
LINES = {"vis": "-", "text": ":"}


def draw_steering(document: Mapping[str, Any], target: Path) -> list[Path]:
    """Draw all adapters on the same scales: the update's relative norm, the cost of each layer, and heat maps.

    Args:
        document: steering.json.
        target: the picture's path, without the suffix.

    Returns:
        the files: PNG and SVG.

    Raises:
        ArgumentsError: matplotlib is not installed, or a file cannot be written.
    """
    models = document["models"]
    maps = [(model, modality) for model in models for modality in model["cosines"]]
    pairs = document["pairs"]
    rows, columns = -(-len(maps) // MAPS_IN_A_ROW), min(len(maps), MAPS_IN_A_ROW)
    heights = [3.6, *[3.3] * rows, *([0.3 * len(pairs) + 0.9] if pairs else [])]
    figure = new_figure((9, sum(heights)))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    norm, cost = parts[0].subplots(1, 2)
    for number, model in enumerate(models):
        look = look_of(number)
        _draw_norms(norm, model, look)
        _draw_costs(cost, model, look, (number - (len(models) - 1) / 2) * 0.6 / len(models))
    ends = [layer for model in models for layer in model["layers"]]
    for axes in (norm, cost):
        axes.set_xlim(min(ends) - 0.5, max(ends) + 0.5)
    cost.axhline(0, color="0.5", linestyle="--", linewidth=1)
    norm.set_ylim(bottom=0)
    norm.set_title("size of the update relative to the\nhidden state (band: spread over tokens)", fontsize=10)
    cost.set_title("loss that is added when\nthis layer alone does not steer", fontsize=10)
    for axes in (norm, cost):
        axes.set_xlabel("decoder layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    handles, labels = norm.get_legend_handles_labels()
    parts[0].legend(handles, labels, loc="outside lower center", ncols=min(2, len(labels)), frameon=False, fontsize=9)
    for row in range(rows):
        _draw_maps(parts[1 + row], maps[row * columns : (row + 1) * columns], columns)
    if pairs:
        _draw_pairs(parts[-1], pairs)
    return save_figure(figure, target)


def _draw_norms(axes: Any, model: Mapping[str, Any], look: Mapping[str, str]) -> None:
    for modality, norms in model["norms"].items():
        several, first = len(model["norms"]) > 1, modality == next(iter(model["norms"]))
        known = [at for at, value in enumerate(norms["mean"]) if value is not None]
        layers = [model["layers"][at] for at in known]
        mean, spread = ([norms[name][at] or 0 for at in known] for name in ("mean", "spread_tokens"))
        whole = model["cost_of_all"]["mean"]
        label = model["name"] + (f", {modality}" if several else "")
        if whole is not None and first:
            label += f" (all layers off: loss {whole:+.3g})"
        axes.plot(layers, mean, label=label, markersize=4, linestyle=LINES.get(modality, "-"), **look)
        bounds = [max(0, m - s) for m, s in zip(mean, spread, strict=True)]
        over = [m + s for m, s in zip(mean, spread, strict=True)]
        axes.fill_between(layers, bounds, over, color=look["color"], alpha=0.15, linewidth=0)


def _draw_costs(axes: Any, model: Mapping[str, Any], look: Mapping[str, str], beside: float) -> None:
    cost = model["cost"]
    known = [at for at, value in enumerate(cost["mean"]) if value is not None]
    mean = [cost["mean"][at] for at in known]
    arms = [
        [abs((cost[end][at] if cost[end][at] is not None else cost["mean"][at]) - cost["mean"][at]) for at in known]
        for end in ("low", "high")
    ]
    layers = [model["layers"][at] + beside for at in known]
    axes.errorbar(layers, mean, yerr=arms, linestyle="none", capsize=2, elinewidth=1, markersize=4, **look)


def _draw_maps(part: Any, maps: Sequence[tuple[Mapping[str, Any], str]], columns: int) -> None:
    """Draw the cosines between the layers of adapters in a row of `columns`, from 0 (white) to 1 (dark)."""
    axes = part.subplots(1, columns, squeeze=False)[0]
    image = None
    for place, (model, modality) in zip(axes, maps, strict=False):
        layers, matrix = model["layers"], model["cosines"][modality]
        image = place.imshow(matrix, cmap="Blues", vmin=0, vmax=1, origin="lower")
        several = f", {modality}" if len(model["cosines"]) > 1 else ""
        chance = model["cosines_by_chance"][modality]
        place.set_title(f"{model['name']}{several}: cosines between\nlayers (by chance {chance:.2f})", fontsize=9)
        _label_layers(place.xaxis, layers)
        _label_layers(place.yaxis, layers)
        place.set_xlabel("layer", fontsize=9)
        place.set_ylabel("layer", fontsize=9)
    for place in axes[len(maps) :]:
        place.set_axis_off()
    part.colorbar(image, ax=list(axes[: len(maps)]), shrink=0.8)


def _draw_pairs(part: Any, pairs: Sequence[Mapping[str, Any]]) -> None:
    """Draw the cosines between the subspaces of every two adapters, a row for each pair."""
    layers = sorted({layer for pair in pairs for layer in pair["layers"]})
    table = [
        [dict(zip(pair["layers"], pair["mean"], strict=True)).get(layer, float("nan")) for layer in layers]
        for pair in pairs
    ]
    axes = part.subplots()
    image = axes.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    shown = [
        f"{' and '.join(pair['models'])} ({pair['modality']}; by chance {pair['by_chance']:.2f})" for pair in pairs
    ]
    axes.set_yticks(range(len(pairs)), shown, fontsize=8)
    _label_layers(axes.xaxis, layers)
    if len(layers) <= 12:
        for row, values in enumerate(table):
            for column, value in enumerate(values):
                if value == value:
                    colour = "white" if value > 0.5 else "black"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xlabel("layer", fontsize=9)
    axes.set_title("cosines between the subspaces of two adapters, by layer", fontsize=9)
    part.colorbar(image, ax=axes)


def _label_layers(axis: Any, layers: Sequence[int]) -> None:
    """Name at most eight layers on an axis."""
    step = -(-len(layers) // 8)
    axis.set_ticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=8)
