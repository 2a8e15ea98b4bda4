"""Draw measurements, from their JSON alone, so that a picture can be drawn again without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_steering_plugin.figures import COLOURS, MARKS, new_figure, save_figure


def draw_modality(models: Sequence[Mapping[str, Any]], target: Path) -> list[Path]:
    """Draw the attention ratio and the image's share of the attention by layer, for all models on the same scales.

    Args:
        models: summaries, as `summary.summarise_model` returns them.
        target: the picture's path, without the suffix.

    Returns:
        the files: PNG and SVG.

    Raises:
        ArgumentsError: matplotlib is not installed, or a file cannot be written.
    """
    figure = new_figure((9, 3.6))
    ratio, share = figure.subplots(1, 2)
    for number, model in enumerate(models):
        look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKS[number % len(MARKS)]}
        _line(ratio, model["lmar"]["all text"], model["name"], look)
        _line(share, model["shares"]["image"], model["name"], look)
    ratio.axhline(1, color="0.5", linestyle="--", linewidth=1)
    ratio.set_yscale("log", base=2)
    ratio.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ratio.set_title("attention per image token / per text token\n(1: balance)", fontsize=10)
    share.set_ylim(0, 1)
    share.set_title("share of the attention that goes\nto the image", fontsize=10)
    for axes in (ratio, share):
        axes.set_xlabel("decoder layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    handles, labels = ratio.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    return save_figure(figure, target)


def _line(axes: Any, values: Mapping[str, Sequence[float | None]], label: str, look: Mapping[str, str]) -> None:
    """Draw means by layer with their intervals."""
    defined = [number for number, value in enumerate(values["mean"]) if value is not None]
    axes.plot(defined, [values["mean"][number] for number in defined], label=label, markersize=4, **look)
    banded = [number for number in defined if values["low"][number] is not None]
    low, high = ([values[end][number] for number in banded] for end in ("low", "high"))
    axes.fill_between(banded, low, high, color=look["color"], alpha=0.15, linewidth=0)
