"""Summarise the results of the measurement: means and spreads over seeds, tables, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from experiments.multitask.tasks import TASKS
from experiments.plots import side_by_side

# One colour of the plot for each method, in their order.
COLOURS = ("#9aa5b1", "#52606d", "#d9822b", "#2b7a78", "#7b5ea7", "#b44d6b")
WITHIN = {"tasks": "all tasks", "cameras": "cameras only"}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean and standard deviation (of a sample; 0 for a single value)."""
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else 0.0}


def by_method(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry for each method, in the order of `rows`: the spread over seeds of every figure.

    Args:
        rows: one for each method and seed, with `method`, `parameters`, `train_seconds`, `accuracy` and, for MixLoRA,
            `information`: numbers by name, nested or not.
    """
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        found.append(
            {
                "method": method,
                "parameters": own[0]["parameters"],
                "seeds": [row["seed"] for row in own],
                **{
                    what: _spreads([row[what] for row in own])
                    for what in ("train_seconds", "accuracy", "information")
                    if own[0].get(what) is not None
                },
            }
        )
    return found


def _spreads(values: Sequence[Any]) -> dict[str, Any]:
    if not isinstance(values[0], Mapping):
        return spread(values)
    return {key: _spreads([value[key] for value in values]) for key in values[0]}


def differences(
    rows: Sequence[Mapping[str, Any]], method: str, other: str, names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return the spread over seeds of the accuracy of `method` minus that of `other`, for every one of `names`."""
    by_seed = {
        name: {row["seed"]: row["accuracy"] for row in rows if row["method"] == name} for name in (method, other)
    }
    seeds = sorted(by_seed[method].keys() & by_seed[other].keys())
    return {
        task: spread([by_seed[method][seed][task] - by_seed[other][seed][task] for seed in seeds]) for task in names
    }


def table(results: Mapping[str, Any]) -> Table:
    """Return a line for the base and for every method: accuracy in percent, mean and standard deviation over seeds."""
    shown = Table(title=f"Accuracy in %, {results['questions']} held-out questions a task", title_justify="left")
    shown.add_column("model")
    for column in ("trained", "all", *TASKS, "told: tasks", "told: cameras", "training"):
        shown.add_column(column, justify="right")
    base = results["base"]
    shown.add_row("base, untuned", "", *(f"{100 * base[task]:.1f}" for task in ("all", *TASKS)), "", "", "")
    for entry in results["methods"]:
        accuracy, information = entry["accuracy"], entry.get("information")
        told = [_of(information[within]["told"], 1) for within in WITHIN] if information else ["", ""]
        shown.add_row(
            entry["method"],
            f"{entry['parameters']:,}",
            *(_of(accuracy[task], 100) for task in ("all", *TASKS)),
            *told,
            f"{entry['train_seconds']['mean']:.0f} s",
        )
    return shown


def _of(value: Mapping[str, float], times: float) -> str:
    digits = 1 if times > 1 else 2
    return f"{times * value['mean']:.{digits}f} ±{times * value['sd']:.{digits}f}"


def markdown(results: Mapping[str, Any]) -> str:
    """Return the figures as Markdown tables: accuracy by task, differences from the first method, information."""
    names = ("all", *TASKS)
    base = results["base"]
    lines = ["| model | trained | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    lines.append("| base, untuned | | " + " | ".join(f"{100 * base[name]:.1f}" for name in names) + " |")
    for entry in results["methods"]:
        shares = " | ".join(_of(entry["accuracy"][name], 100) for name in names)
        lines.append(f"| {entry['method']} | {entry['parameters']:,} | {shares} |")
    lines += ["", "| difference, points | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for pair, of_pair in results["differences"].items():
        lines.append(f"| {pair} | " + " | ".join(_of(of_pair[name], 100) for name in names) + " |")
    lines += ["", "| chosen factors | among | told | by chance | sets in use |", "|---|---|---|---|---|"]
    for entry in results["methods"]:
        for within, said in WITHIN.items() if "information" in entry else ():
            figures = entry["information"][within]
            told, chance = (_of(figures[name], 1) for name in ("told", "chance"))
            lines.append(f"| {entry['method']} | {said} | {told} | {chance} | {figures['sets']['mean']:.1f} |")
    return "\n".join(lines) + "\n"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Plot accuracy by task (left), and by layer how much of the task the chosen factors tell (right)."""
    with side_by_side(path, (13, 4.6), (2.1, 1)) as (left, right):
        _plot_accuracy(left, results)
        _plot_information(right, results["methods"])


def _plot_accuracy(axes: Any, results: Mapping[str, Any]) -> None:
    """Draw a bar for each method and task, with a dot for every seed."""
    names = ("all", *TASKS)
    methods = results["methods"]
    width = 0.8 / len(methods)
    for number, (entry, colour) in enumerate(zip(methods, COLOURS, strict=False)):
        at = [place + (number - (len(methods) - 1) / 2) * width for place in range(len(names))]
        heights = [100 * entry["accuracy"][name]["mean"] for name in names]
        axes.bar(at, heights, 0.92 * width, color=colour, label=entry["method"], zorder=2)
        for row in results["rows"]:
            if row["method"] == entry["method"]:
                dots = [100 * row["accuracy"][name] for name in names]
                axes.scatter(at, dots, s=7, color="black", linewidths=0, zorder=3)
    base = [100 * results["base"][name] for name in names]
    axes.hlines(
        base, [x - 0.42 for x in range(len(names))], [x + 0.42 for x in range(len(names))],
        color="#c0392b", linestyles="dashed", linewidth=1, zorder=4, label="base, untuned",
    )  # fmt: skip
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("right answers, %")
    axes.set_ylim(0, 118)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, ncols=3, loc="upper center", frameon=False)
    axes.set_title(f"Accuracy by task; dots are seeds ({results['steps']} steps)", fontsize=10)


def _plot_information(axes: Any, methods: Sequence[Mapping[str, Any]]) -> None:
    for entry, colour in zip(methods, COLOURS, strict=False):
        if "information" not in entry:
            continue
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
