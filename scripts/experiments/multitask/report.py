"""Summarise what MixLoRA's choices tell, and draw it beside the accuracy of all methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.multitask.tasks import TASKS
from experiments.plots import side_by_side
from llava_steering_plugin.comparison.results.outcomes import MEAN

# One colour of the plot for each method, in their order.
COLOURS = ("#9aa5b1", "#52606d", "#d9822b", "#2b7a78", "#7b5ea7", "#b44d6b")
WITHIN = {"tasks": "all tasks", "cameras": "cameras only"}


def by_method(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry for each method, in the order of `rows`: the spread over seeds of every figure.

    Args:
        rows: one for each method and seed, with `method`, `seed` and `information`: numbers by name, nested.
    """
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        information = _spreads([row["information"] for row in own])
        found.append({"method": method, "seeds": [row["seed"] for row in own], "information": information})
    return found


def _spreads(values: Sequence[Any]) -> dict[str, Any]:
    """Return mean and standard deviation (of a sample; 0 for a single value) of numbers, or of numbers by name."""
    if not isinstance(values[0], Mapping):
        return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else 0.0}
    return {key: _spreads([value[key] for value in values]) for key in values[0]}


def markdown(results: Mapping[str, Any]) -> str:
    """Return what the choices tell as a Markdown table; the comparison has tables of its own."""
    lines = ["| chosen factors | among | told | by chance | sets in use |", "|---|---|---|---|---|"]
    for entry in results["information"]:
        for within, said in WITHIN.items():
            figures = entry["information"][within]
            told, chance = (_of(figures[name]) for name in ("told", "chance"))
            lines.append(f"| {entry['method']} | {said} | {told} | {chance} | {figures['sets']['mean']:.1f} |")
    return "\n".join(lines) + "\n"


def _of(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.2f} ±{value['sd']:.2f}"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Plot accuracy by task (left), and by layer how much of the task the chosen factors tell (right)."""
    with side_by_side(path, (13, 4.6), (2.1, 1)) as (left, right):
        _plot_accuracy(left, results)
        _plot_information(right, results)


def _plot_accuracy(axes: Any, results: Mapping[str, Any]) -> None:
    """Draw a bar for each method and task, with its standard deviation over seeds."""
    names = (MEAN, *TASKS)
    (task,) = results["comparison"]["tasks"]
    methods = [one for one in task["methods"] if not one["frozen"]]
    width = 0.8 / len(methods)
    for number, (one, colour) in enumerate(zip(methods, COLOURS, strict=False)):
        scores = [(place, score) for place, name in enumerate(names) if (score := one["outcomes"][name]["score"])]
        at = [place + (number - (len(methods) - 1) / 2) * width for place, _ in scores]
        axes.bar(
            at, [score["mean"] for _, score in scores], 0.92 * width, color=colour, label=one["method"], zorder=2,
            yerr=[score["deviation"] or 0 for _, score in scores], error_kw={"linewidth": 0.8},
        )  # fmt: skip
    for one in task["methods"]:
        base = [one["outcomes"][name]["score"] for name in names]
        if one["frozen"] and all(base):
            axes.hlines(
                [score["mean"] for score in base],
                [x - 0.42 for x in range(len(names))], [x + 0.42 for x in range(len(names))],
                color="#c0392b", linestyles="dashed", linewidth=1, zorder=4, label=one["method"],
            )  # fmt: skip
    axes.set_xticks(range(len(names)), ["mean", *TASKS])
    axes.set_ylabel("right answers, %")
    axes.set_ylim(0, 118)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, ncols=3, loc="upper center", frameon=False)
    axes.set_title(f"Accuracy by task, and its deviation over seeds ({results['steps']} steps)", fontsize=10)


def _plot_information(axes: Any, results: Mapping[str, Any]) -> None:
    (task,) = results["comparison"]["tasks"]
    order = [one["method"] for one in task["methods"] if not one["frozen"]]
    for entry in results["information"]:
        colour = COLOURS[order.index(entry["method"]) % len(COLOURS)]
        for within, style in zip(WITHIN, ("-", ":"), strict=True):
            layers = entry["information"][within]["layers"]
            places = sorted(layers, key=int)
            axes.errorbar(
                [int(place) for place in places], [layers[place]["mean"] for place in places],
                yerr=[layers[place]["sd"] for place in places], color=colour, linestyle=style, marker="o",
                markersize=4, capsize=2, label=f"{entry['method'].rpartition(', ')[2]}, {WITHIN[within]}",
            )  # fmt: skip
            axes.set_xticks([int(place) for place in places])
    axes.set_ylim(0, 1)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("mutual information / entropy of the task")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="best")
    axes.set_title("MixLoRA: what the chosen factors tell", fontsize=10)
