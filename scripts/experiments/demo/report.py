"""Show the results of the demo: a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from experiments.plots import side_by_side
from experiments.world import KINDS


def table(results: Mapping[str, Any]) -> Table:
    """Return the answers to upstream's evaluation before and after, one line each."""
    title = f"Right answers to upstream's evaluation, {results['questions']} held-out questions"
    shown = Table(title=title, title_justify="left")
    for column in ("model", "camera", *KINDS):
        shown.add_column(column, justify="right" if column in KINDS else "left")
    for row in results["rows"]:
        shown.add_row(row["model"], row["camera"], *(f"{row[kind]:.1%}" for kind in KINDS))
    return shown


def attention(results: Mapping[str, Any]) -> Table:
    """Return the share of the attention that goes to the image, one line for each measured model, by layer."""
    shares: Mapping[str, Sequence[float]] = results["attention_to_image"]
    shown = Table(title="Share of the attention that goes to the image", title_justify="left")
    shown.add_column("model")
    for layer in range(max(map(len, shares.values()))):
        shown.add_column(f"layer {layer}", justify="right")
    for name, by_layer in shares.items():
        shown.add_row(name, *(f"{share:.0%}" for share in by_layer))
    return shown


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Plot accuracy by kind of question (left), and colour accuracy against trained parameters (right)."""
    rows: Sequence[Mapping[str, Any]] = results["rows"]
    with side_by_side(path, (11, 4.2), (1, 1)) as (left, right):
        _plot_kinds(left, rows)
        _plot_parameters(right, _tuned(results["comparison"]), 100 * rows[1]["colour"])


def _tuned(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return name, trained parameters and colour accuracy in percent of the tunings that have a result."""
    (task,) = document["tasks"]
    return [
        {
            "model": one["method"],
            "parameters": one["costs"]["trained_parameters"],
            "colour": one["outcomes"]["colour"]["score"]["mean"],
        }
        for one in task["methods"]
        if not one["frozen"] and one["costs"]
    ]


def _plot_kinds(axes: Any, bars: Sequence[Mapping[str, Any]]) -> None:
    for place, (row, colour) in enumerate(zip(bars, ("#9aa5b1", "#d9822b", "#2b7a78"), strict=True)):
        at = [kind + (place - 1) * 0.27 for kind in range(len(KINDS))]
        drawn = axes.bar(
            at, [100 * row[kind] for kind in KINDS], 0.25, color=colour, label=f"{row['model']}, {row['camera']}"
        )
        axes.bar_label(drawn, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(KINDS)), KINDS)
    axes.set_ylabel("right answers, %")
    axes.set_ylim(0, 118)
    axes.legend(fontsize=8, loc="upper center", ncols=3, frameon=False)
    axes.set_title("Before and after", fontsize=10)


def _plot_parameters(axes: Any, tuned: Sequence[Mapping[str, Any]], before: float) -> None:
    for row in tuned:
        axes.scatter(row["parameters"], row["colour"], s=45, zorder=3)
    for place, parameters in enumerate(sorted({row["parameters"] for row in tuned})):
        alike = sorted((row for row in tuned if row["parameters"] == parameters), key=lambda row: -float(row["colour"]))
        # Points of one size share a label, because they may overlap. Neighbours' labels alternate above and below.
        above = place % 2 == 0
        axes.annotate(
            "\n".join(f"{row['model']}: {row['colour']:.1f}%" for row in alike),
            (parameters, alike[0 if above else -1]["colour"]),
            xytext=(0, 7 if above else -9),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=7.5,
        )
    axes.axhline(before, color="#d9822b", linestyle="--", linewidth=1, label="base, shifted camera")
    axes.set_xscale("log")
    axes.set_xlim(2e2, 4e5)
    axes.set_ylim(0, 108)
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("colour questions right, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    axes.set_title("Shifted camera: what a parameter buys", fontsize=10)
