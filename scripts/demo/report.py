"""What came out: results.json, a table, and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from world import KINDS


def accuracy(answers: Path, expected: Path, kinds: Sequence[str] = KINDS) -> dict[str, float]:
    """Share of exactly right answers by kind of question, and over all, from upstream's answers file.

    Raises:
        ValueError: the two files are not of the same questions.
    """
    wanted = json.loads(expected.read_text())
    given = {line["question_id"]: line["text"] for line in map(json.loads, answers.read_text().splitlines())}
    if sorted(given) != list(range(len(wanted))):
        raise ValueError(f"{answers} has {len(given)} answers and {expected} {len(wanted)} questions")
    right = [given[place].strip().lower() == entry["answer"] for place, entry in enumerate(wanted)]
    shares = {"all": sum(right) / len(right)}
    for kind in kinds:
        of_kind = [hit for hit, entry in zip(right, wanted, strict=True) if entry["kind"] == kind]
        shares[kind] = sum(of_kind) / len(of_kind)
    return shares


def parameters(adapter: Path, without: str | None = None) -> int:
    """Parameters in an adapter's file, ours or PEFT's; those with `without` in their names are left out."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        names = [name for name in file.keys() if not name.startswith("fingerprint.")]
        shapes = [file.get_slice(name).get_shape() for name in names if without is None or without not in name]
    count = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        count += size
    return count


def table(results: Mapping[str, Any]) -> Table:
    """The results, one line each for the base and for every way of teaching the shifted camera."""
    shown = Table(title=f"Accuracy on {results['questions']} held-out questions", title_justify="left")
    for column in ("model", "camera", "trained parameters", *KINDS, "training"):
        shown.add_column(column, justify="left" if column in ("model", "camera") else "right")
    for row in results["rows"]:
        seconds = f"{row['train_seconds']:.0f} s" if row["train_seconds"] else ""
        parameters = f"{row['parameters']:,}" if row["parameters"] else ""
        shown.add_row(row["model"], row["camera"], parameters, *(f"{row[kind]:.1%}" for kind in KINDS), seconds)
    return shown


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Left: before and after, by kind of question. Right: colour accuracy against trained parameters, on a log axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows: Sequence[Mapping[str, Any]] = results["rows"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    bars = rows[:3]
    for place, (row, colour) in enumerate(zip(bars, ("#9aa5b1", "#d9822b", "#2b7a78"), strict=True)):
        at = [kind + (place - 1) * 0.27 for kind in range(len(KINDS))]
        drawn = left.bar(
            at, [100 * row[kind] for kind in KINDS], 0.25, color=colour, label=f"{row['model']}, {row['camera']}"
        )
        left.bar_label(drawn, fmt="%.0f", fontsize=8)
    left.set_xticks(range(len(KINDS)), KINDS)
    left.set_ylabel("right answers, %")
    left.set_ylim(0, 118)
    left.legend(fontsize=8, loc="upper center", ncols=3, frameon=False)
    left.set_title("Before and after", fontsize=10)
    tuned = [row for row in rows if row["parameters"]]
    for row in tuned:
        right.scatter(row["parameters"], 100 * row["colour"], s=45, zorder=3)
    for place, parameters in enumerate(sorted({row["parameters"] for row in tuned})):
        alike = sorted((row for row in tuned if row["parameters"] == parameters), key=lambda row: -float(row["colour"]))
        # Points of one size share a label: they may lie on top of each other. Above and below in turns, for neighbours.
        above = place % 2 == 0
        right.annotate(
            "\n".join(f"{row['model']}: {row['colour']:.1%}" for row in alike),
            (parameters, 100 * alike[0 if above else -1]["colour"]),
            xytext=(0, 7 if above else -9),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=7.5,
        )
    right.axhline(100 * rows[1]["colour"], color="#d9822b", linestyle="--", linewidth=1, label="base, shifted camera")
    right.set_xscale("log")
    right.set_xlim(2e2, 4e5)
    right.set_ylim(0, 108)
    right.set_xlabel("trained parameters")
    right.set_ylabel("colour questions right, %")
    right.grid(alpha=0.3)
    right.legend(fontsize=8, loc="lower right")
    right.set_title("Shifted camera: what a parameter buys", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
