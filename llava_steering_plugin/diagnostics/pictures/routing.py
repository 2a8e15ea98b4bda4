"""Draw the routing of adapters from its JSON alone: what choices are worth, what they tell, which factors they use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_steering_plugin.figures import look_of, new_figure, save_figure

# What takes the place of the routers' choices, as the picture says it, in its order.
VARIANTS = {
    "shuffled": "another\nsample's",
    "shuffled_within_task": "another's of\nthe same task",
    "most_frequent": "most\nfrequent",
    "random": "random",
}
BY_LAYER = {
    "mutual_information": "adjusted mutual information\nof choice and task",
    "entropy": "entropy of the factors' use\n(1: all alike)",
}
# B has hollow marks, which stay visible where both sides have the same values.
SIDES: Mapping[str, Mapping[str, Any]] = {
    "A": {"linestyle": "-", "markersize": 4},
    "B": {"linestyle": ":", "markersize": 7, "markerfacecolor": "none"},
}
MODELS_IN_A_ROW = 3
MOST_ROWS = 30
SELECTION = {"independent": "IFS", "conditional": "CFS"}


def draw_routing(document: Mapping[str, Any], target: Path) -> list[Path]:
    """Draw all adapters on the same scales.

    `target` shows what choices are worth and, by layer, what they tell; `-use` beside it which factors are used, and
    `-tsne` the samples by their choices and scores (left out for one task).

    Args:
        document: routing.json.
        target: the first picture's path, without the suffix.

    Returns:
        the files: PNG and SVG of each.

    Raises:
        ArgumentsError: matplotlib is not installed, or a file cannot be written.
    """
    models = document["models"]
    files = _draw_worth(models, document["tasks"], target)
    files += _draw_use(models, target.with_name(f"{target.name}-use"))
    if any(model["embeddings"] for model in models):
        files += _draw_planes(models, document["tasks"], target.with_name(f"{target.name}-tsne"))
    return files


def _draw_worth(models: Sequence[Mapping[str, Any]], tasks: Sequence[str], target: Path) -> list[Path]:
    rows = -(-len(models) // MODELS_IN_A_ROW)
    figure = new_figure((9, 3.3 * rows + 3.2))
    above, below = figure.subfigures(2, 1, height_ratios=[3.3 * rows, 3.2])
    columns = min(len(models), MODELS_IN_A_ROW)
    places = above.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for place, model in zip(places, models, strict=False):
        _draw_lost(place, model, tasks)
    for place in places[len(models) :]:
        place.set_axis_off()
    for place in places[::columns]:
        place.set_ylabel("loss added")
    above.suptitle("loss that is added when the routers' choices are replaced by", fontsize=10)
    handles, labels = places[0].get_legend_handles_labels()
    above.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False, fontsize=8)
    _draw_by_layer(below, models)
    return save_figure(figure, target)


def _draw_lost(axes: Any, model: Mapping[str, Any], tasks: Sequence[str]) -> None:
    """Draw what is lost with each kind of other choices, over all and for each task, with intervals."""
    variants = [variant for variant in VARIANTS if variant in model["forced"]]
    shown = ["over all", *tasks] if len(tasks) > 1 else ["over all"]
    for number, name in enumerate(shown):
        found = [model["forced"][variant] for variant in variants]
        values = [(each["tasks"].get(name) if number else each["over_all"]) for each in found]
        known = [(at, value["loss_added"]) for at, value in enumerate(values) if value is not None]
        means = [value["mean"] for _, value in known]
        arms = [
            [abs((value[end] if value[end] is not None else value["mean"]) - value["mean"]) for _, value in known]
            for end in ("low", "high")
        ]
        beside = (number - (len(shown) - 1) / 2) * 0.7 / len(shown)
        places = [at + beside for at, _ in known]
        look = look_of(number)
        axes.errorbar(places, means, yerr=arms, linestyle="none", capsize=2, markersize=4, label=name, **look)
    axes.axhline(0, color="0.5", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(variants)), [VARIANTS[variant] for variant in variants], fontsize=7)
    axes.set_title(model["name"], fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, axis="y")


def _draw_by_layer(part: Any, models: Sequence[Mapping[str, Any]]) -> None:
    """Draw what choices tell and how evenly they use the factors, by layer: the mean over its linears."""
    for axes, (quantity, title) in zip(part.subplots(1, 2), BY_LAYER.items(), strict=True):
        for number, model in enumerate(models):
            look = look_of(number)
            for side, style in SIDES.items():
                layers = sorted({place["layer"] for place in model["places"]})
                means = [_mean(model["places"], layer, side, quantity) for layer in layers]
                label = f"{model['name']}: {side} ({SELECTION[model['selection'][side]]})"
                if None not in means:
                    axes.plot(layers, means, label=label, **style, **look)
        axes.set_ylim(-0.05, 1.05)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("decoder layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    part.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=8)


def _mean(places: Sequence[Mapping[str, Any]], layer: int, side: str, quantity: str) -> float | None:
    values = [place[quantity] for place in places if place["layer"] == layer and place["side"] == side]
    return None if None in values else sum(values) / len(values)


def _draw_use(models: Sequence[Mapping[str, Any]], target: Path) -> list[Path]:
    """Draw the share of samples that choose each factor: rows are linears, columns factors."""
    heights = [min(5.5, 0.085 * len(model["places"]) + 1.2) for model in models]
    figure = new_figure((9, sum(heights)))
    axes = figure.subplots(len(models), 2, squeeze=False, height_ratios=heights)
    image = None
    for row, model in zip(axes, models, strict=True):
        for place, side in zip(row, SIDES, strict=True):
            mine = [each for each in model["places"] if each["side"] == side]
            image = place.imshow([each["use"] for each in mine], cmap="Blues", vmin=0, vmax=1, aspect="auto")
            place.set_yticks(*_row_names(mine), fontsize=7)
            place.set_title(f"{model['name']}: factors {side} ({SELECTION[model['selection'][side]]})", fontsize=9)
            place.set_xticks(range(model["factors"]), [str(each) for each in range(model["factors"])], fontsize=7)
            place.set_xlabel("factor", fontsize=8)
    figure.colorbar(image, ax=axes, label="share of samples that choose it", shrink=0.6, aspect=30)
    return save_figure(figure, target)


def _row_names(places: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[str]]:
    """Return the rows that are named, and their names: all linears if they are few, else at most 16 layers."""
    if len(places) <= MOST_ROWS:
        return list(range(len(places))), [f"{place['layer']} {place['linear']}" for place in places]
    firsts = {place["layer"]: row for row, place in reversed(list(enumerate(places)))}
    layers = sorted(firsts)[:: -(-len(firsts) // 16)]
    return [firsts[layer] for layer in layers], [f"layer {layer}" for layer in layers]


def _draw_planes(models: Sequence[Mapping[str, Any]], tasks: Sequence[str], target: Path) -> list[Path]:
    """Draw the samples in t-SNE's planes, coloured by task: rows are models."""
    figure = new_figure((9, 2.5 * len(models) + 0.5))
    axes = figure.subplots(len(models), 4, squeeze=False)
    for row, model in zip(axes, models, strict=True):
        planes = [(side, kind) for side in SIDES for kind in ("selections", "scores")]
        for place, (side, kind) in zip(row, planes, strict=True):
            points = model["embeddings"][side][kind] if model["embeddings"] else None
            place.set_title(f"{side} ({SELECTION[model['selection'][side]]}): {kind}", fontsize=9)
            place.set_xticks([])
            place.set_yticks([])
            if points is None:
                place.text(0.5, 0.5, "all alike", ha="center", va="center", transform=place.transAxes, fontsize=9)
                continue
            for number, task in enumerate(tasks):
                mine = [point for point, its in zip(points, model["points"], strict=True) if its == task]
                look = look_of(number + 1)
                place.scatter(*zip(*mine, strict=True), s=14, label=task, alpha=0.8, linewidths=0, **look)
        row[0].set_ylabel(model["name"], fontsize=9)
    handles, labels = next(place.get_legend_handles_labels() for place in axes.flatten() if place.collections)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False, fontsize=9)
    return save_figure(figure, target)
