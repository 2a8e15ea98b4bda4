"""Draw scores against trained parameters, a panel for each task and test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_steering_plugin.comparison.results.labels import Label, name_line, place_labels
from llava_steering_plugin.comparison.results.markdown import seeds_of
from llava_steering_plugin.comparison.results.summary import Reached, Summary, TaskSummary
from llava_steering_plugin.figures import look_of, new_figure, save_figure

COLUMNS = 3
PANEL = (4.6, 3.7)  # inches
FONT = 8.0
GREY = "0.45"


def draw(summary: Summary, target: Path) -> list[Path]:
    """Draw the mean over seeds of each method with its deviation; the frozen model is a line.

    Args:
        target: the picture's path, without the suffix.

    Returns:
        the files: PNG and SVG; none where no method has a score.

    Raises:
        ArgumentsError: matplotlib is not installed, or a file cannot be written.
    """
    panels = [(task, test) for task in summary.tasks for test in task.tests if _points(task, test)]
    if not panels:
        return []
    names = list(dict.fromkeys(one.method for task in summary.tasks for one in task.methods if not one.frozen))
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure((PANEL[0] * columns, PANEL[1] * rows))
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    drawn = []
    for axes, (task, test) in zip(grid.flat, panels, strict=False):
        drawn.append((axes, *_panel(axes, task, test, names)))
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    figure.draw_without_rendering()  # sets all sizes; labels come after that, and change none
    figure.set_layout_engine("none")
    base = next((one.method for task in summary.tasks for one in task.methods if one.frozen), "")
    for axes, labels, bars, line in drawn:
        if line is not None:
            name_line(axes, base, line, labels, FONT, GREY)
        place_labels(axes, labels, _covered(axes, bars, line), FONT)
    return save_figure(figure, target)


def _points(task: TaskSummary, test: str) -> list[Reached]:
    """Return the methods that are drawn as points."""
    return [one for one in task.methods if not one.frozen and one.costs and one.outcomes[test].score]


def _panel(
    axes: Any, task: TaskSummary, test: str, names: Sequence[str]
) -> tuple[list[Label], list[tuple[float, float, float]], float | None]:
    """Draw a panel without its labels.

    Returns:
        the labels; x, low and high of the error bars; and the height of the frozen model's line.
    """
    labels: list[Label] = []
    bars: list[tuple[float, float, float]] = []
    for one in _points(task, test):
        score, costs = one.outcomes[test].score, one.costs
        assert score is not None and costs is not None
        x, look = max(costs.with_projector, 1), look_of(names.index(one.method) + 1)
        deviation = score.deviation or 0.0
        axes.errorbar(
            x, score.mean, yerr=deviation or None, markersize=7, markeredgecolor="white", markeredgewidth=0.6,
            capsize=3, elinewidth=1, zorder=3, linestyle="none", **look,
        )  # fmt: skip
        bars.append((x, score.mean - deviation, score.mean + deviation))
        shown = "" if len(one.done) == len(one.seeds) else f" ({seeds_of(one)} seeds)"
        labels.append(Label(one.method + shown, x, score.mean, look["color"]))
    line = next((found for one in task.methods if one.frozen and (found := one.outcomes[test].score)), None)
    _scale(axes, bars, None if line is None else line.mean)
    if line is not None:
        axes.axhline(line.mean, color=GREY, linestyle="--", linewidth=1, zorder=1)
    axes.set_title(task.task if len(task.tests) == 1 else f"{task.task}: {test}", fontsize=10)
    projector = any(one.costs and one.costs.projector_parameters for one in task.methods)
    axes.set_xlabel("trained parameters" + (", projector included" if projector else ""), fontsize=9)
    axes.set_ylabel("score, mean and deviation over seeds", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
    if lost := [one.method for one in task.methods if one not in _points(task, test) and not one.frozen]:
        axes.text(
            0.99, 0.01, f"no result: {', '.join(lost)}", transform=axes.transAxes, fontsize=FONT, color=GREY,
            ha="right", in_layout=False,
        )  # fmt: skip
    return labels, bars, None if line is None else line.mean


def _scale(axes: Any, bars: Sequence[tuple[float, float, float]], line: float | None) -> None:
    """Leave room for labels around the points: half of a decade at least, and a fifth of the height."""
    axes.set_xscale("log")
    exponents = [math.log10(x) for x, *_ in bars]
    beside = max(0.5, 0.25 * (max(exponents) - min(exponents)))
    axes.set_xlim(10 ** (min(exponents) - beside), 10 ** (max(exponents) + beside))
    heights = [end for _, *ends in bars for end in ends] + ([] if line is None else [line])
    above = max(1.0, 0.2 * (max(heights) - min(heights)))
    axes.set_ylim(min(heights) - above, max(heights) + above)


def _covered(axes: Any, bars: Sequence[tuple[float, float, float]], line: float | None) -> list[Any]:
    """Return the boxes of error bars, and of the line with its name, in pixels."""
    from matplotlib.transforms import Bbox

    found = []
    for x, low, high in bars:
        (left, bottom), (_, top) = axes.transData.transform(((x, low), (x, high)))
        found.append(Bbox.from_extents(left - 4, bottom, left + 4, top))
    if line is not None:
        whole = axes.get_window_extent()
        height = axes.transData.transform((1, line))[1]
        found.append(Bbox.from_extents(whole.x0, height - 1, whole.x1, height + 1))
    renderer = axes.get_figure().canvas.get_renderer()
    return [*found, *(text.get_window_extent(renderer) for text in axes.texts)]
