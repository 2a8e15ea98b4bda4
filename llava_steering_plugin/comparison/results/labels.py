"""Place the labels of points so that none covers another label, a point or an error bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# Where a label may stand: these directions, near the point first, and farther away with a line to it.
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
DISTANCES = (7, 16, 28, 42, 58, 76)  # of a label from its point, in points
LINE_FROM = 16  # the distance from which a line leads to the point
POINT_SIZE = 9  # of what a point covers, in points
GAP = 1.5  # between two labels, in pixels
TEXT = "0.15"


@dataclass(frozen=True)
class Label:
    """Holds a text that belongs to a point, in data coordinates; a line between them has the point's colour."""

    text: str
    x: float
    y: float
    colour: str


def place_labels(axes: Any, labels: Sequence[Label], covered: Sequence[Any], size: float) -> list[Any]:
    """Write labels beside their points, each at the first place that is free; return the annotations.

    The layout of the figure must be done. Where no place is free, the one that covers least is taken.

    Args:
        covered: boxes in pixels that no label may cover: error bars and lines. Points are added here.
        size: of the font.
    """
    figure = axes.get_figure()
    renderer = figure.canvas.get_renderer()
    taken = [*covered, *(_around(axes, label, POINT_SIZE * figure.dpi / 72) for label in labels)]
    placed = []
    for label in sorted(labels, key=lambda each: (-each.y, each.x)):
        best, least = None, float("inf")
        for offset, aligned, far in _places():
            note = _write(axes, label, offset, aligned, far, size)
            box = note.get_window_extent(renderer) if not far else _text_box(note, renderer)
            overlap = sum(_shared(box, other) for other in taken) + 10 * _outside(box, axes.get_window_extent(renderer))
            if overlap < least:
                if best is not None:
                    best[0].remove()
                best, least = (note, box), overlap
            else:
                note.remove()
            if least == 0:
                break
        if best is not None:
            placed.append(best[0])
            taken.append(best[1].padded(GAP))
    return placed


def name_line(axes: Any, text: str, height: float, points: Sequence[Label], size: float, colour: str) -> Any:
    """Write the name of a horizontal line at the first place along it that covers no point; return the annotation.

    Args:
        height: of the line, in data coordinates.
        points: whose marks may not be covered.
    """
    figure = axes.get_figure()
    renderer = figure.canvas.get_renderer()
    marks = [_around(axes, each, POINT_SIZE * figure.dpi / 72) for each in points]
    best, least = None, float("inf")
    for place, across in ((0.01, "left"), (0.99, "right"), (0.5, "center"), (0.25, "center"), (0.75, "center")):
        for offset, along in ((2, "bottom"), (-2, "top")):
            note = axes.annotate(
                text, (place, height), xycoords=("axes fraction", "data"), xytext=(0, offset),
                textcoords="offset points", ha=across, va=along, fontsize=size, color=colour, in_layout=False,
            )  # fmt: skip
            overlap = sum(_shared(note.get_window_extent(renderer), mark) for mark in marks)
            if overlap < least:
                if best is not None:
                    best.remove()
                best, least = note, overlap
            else:
                note.remove()
            if least == 0:
                return best
    return best


def _places() -> Iterator[tuple[tuple[float, float], tuple[str, str], bool]]:
    """Yield the offset from the point in points, the alignment of the text, and whether a line leads to it."""
    across, along = {1: "left", -1: "right", 0: "center"}, {1: "bottom", -1: "top", 0: "center"}
    for distance in DISTANCES:
        for x, y in DIRECTIONS:
            length = distance * (0.7 if x and y else 1.0)
            yield (x * length, y * length), (across[x], along[y]), distance >= LINE_FROM


def _write(
    axes: Any, label: Label, offset: tuple[float, float], aligned: tuple[str, str], far: bool, size: float
) -> Any:
    return axes.annotate(
        label.text,
        (label.x, label.y),
        xytext=offset,
        textcoords="offset points",
        ha=aligned[0],
        va=aligned[1],
        fontsize=size,
        color=TEXT,
        in_layout=False,
        arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "shrinkB": 4} if far else None,
    )


def _text_box(note: Any, renderer: Any) -> Any:
    """Return the box of an annotation's text, without its line."""
    from matplotlib.text import Text

    note.update_positions(renderer)
    return Text.get_window_extent(note, renderer)


def _around(axes: Any, label: Label, pixels: float) -> Any:
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform((label.x, label.y))
    return Bbox.from_bounds(x - pixels / 2, y - pixels / 2, pixels, pixels)


def _shared(one: Any, other: Any) -> float:
    """Return how many square pixels two boxes share."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0


def _outside(box: Any, whole: Any) -> float:
    """Return how many square pixels of a box are outside of another."""
    return float(box.width * box.height) - _shared(box, whole)
