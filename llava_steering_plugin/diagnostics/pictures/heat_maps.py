"""Draw interference between tasks as heat maps, from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_steering_plugin.diagnostics.pictures.plots import new_figure, save_figure

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
        figure.colorbar(image, ax=axes, label="relative to the task's own step", shrink=0.8)
    return save_figure(figure, target)


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
