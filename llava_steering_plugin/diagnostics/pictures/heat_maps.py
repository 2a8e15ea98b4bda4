"""Draw heat maps from JSON alone: interference between tasks, and attention head by head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_steering_plugin.figures import new_figure, save_figure

# The order of the maps, and what stands above them.
SIDES = {"all": "all parameters", "A": "factors A", "B": "factors B", "routers": "routers"}
SHOWN = "ratio_of_means"


def draw_interference(document: Mapping[str, Any], target: Path) -> list[Path]:
    """Draw a row of heat maps for each model, all on one scale from -1 (harm) over 0 to 1 (as good as its own step).

    Args:
        document: interference.json.
        target: the picture's path, without the suffix.

    Returns:
        the files: PNG and SVG.

    Raises:
        ArgumentsError: matplotlib is not installed, or a file cannot be written.
    """
    models, tasks = document["models"], document["tasks"]
    sides = [side for side in _sides(models) if any(side in model["sides"] for model in models)]
    edge = max(2.4, 0.55 * len(tasks) + 0.9)
    figure = new_figure((edge * len(sides) + 1, edge * len(models) + 0.4))
    axes = figure.subplots(len(models), len(sides), squeeze=False)
    image = None
    for row, model in zip(axes, models, strict=True):
        for place, side in zip(row, sides, strict=True):
            if side not in model["sides"]:
                place.set_axis_off()
                continue
            image = _draw_map(place, model["sides"][side][SHOWN], tasks)
            place.set_title(f"{model['name']}: {SIDES.get(side, side)}", fontsize=9)
        row[0].set_ylabel("on the loss of", fontsize=9)
    for place in axes[-1]:
        place.set_xlabel("effect of a step for", fontsize=9)
    if image is not None:
        figure.colorbar(image, ax=axes, label="relative to the task's own step", shrink=0.8, extend="both")
    return save_figure(figure, target)


def draw_heads(models: Sequence[Mapping[str, Any]], target: Path) -> list[Path]:
    """Draw each model's attention ratio with all text as a heat map of heads and layers, all on one scale around 1.

    Args:
        models: summaries, as `summary.summarise_model` returns them.
        target: the picture's path, without the suffix.

    Returns:
        the files: PNG and SVG.

    Raises:
        ArgumentsError: matplotlib is not installed, or a file cannot be written.
    """
    tables = [_logarithms(model["lmar_by_head"]) for model in models]
    # A few heads without attention to the image would take all the scale: it ends at the farthest twentieth.
    distances = sorted(abs(value) for table in tables for row in table for value in row if math.isfinite(value))
    reach = max(1.0, distances[int(0.95 * (len(distances) - 1))]) if distances else 1.0
    figure = new_figure((3.6 * len(models) + 1.2, 4))
    axes = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    image = None
    for place, model, table in zip(axes, models, tables, strict=True):
        place.set_title(model["name"], fontsize=10)
        place.set_xlabel("head")
        for axis in (place.xaxis, place.yaxis):
            axis.get_major_locator().set_params(integer=True)
        if not table:
            place.set_axis_off()
            continue
        image = place.imshow(table, cmap="PuOr_r", vmin=-reach, vmax=reach, aspect="auto", origin="lower")
    axes[0].set_ylabel("decoder layer")
    if image is not None:
        label = "attention per image token / per text token"
        bar = figure.colorbar(image, ax=axes, label=label, extend="both")
        bar.locator.set_params(integer=True)
        bar.formatter = lambda value, _: f"{2**value:.4g}"
        bar.update_ticks()
    return save_figure(figure, target)


def _logarithms(table: Sequence[Sequence[float | None]]) -> list[list[float]]:
    """Return log2 of [layers][heads]; NaN, which stays white, for what is not defined or 0."""
    return [[math.log2(value) if value else math.nan for value in row] for row in table]


def _sides(models: Any) -> list[str]:
    """Return all sides of all models, the known ones first."""
    return list(dict.fromkeys([*SIDES, *(side for model in models for side in model["sides"])]))


def _draw_map(place: Any, matrix: Any, tasks: Any) -> Any:
    values = [[float("nan") if value is None else value for value in row] for row in matrix]
    # Orange and purple, which colour-blind readers can tell apart; the numbers say the rest.
    image = place.imshow(values, cmap="PuOr_r", vmin=-1, vmax=1)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            words = "-" if value != value else f"{value:.2f}"
            colour = "white" if abs(value) > 0.6 else "black"
            place.text(j, i, words, ha="center", va="center", fontsize=8, color=colour)
    place.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right", fontsize=8)
    place.set_yticks(range(len(tasks)), tasks, fontsize=8)
    return image
