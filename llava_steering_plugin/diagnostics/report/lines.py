"""Lines with their intervals, drawn by plotly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from plotly import graph_objects

from llava_steering_plugin.diagnostics.report.look import COLOURS, DASHES, GREY, HEIGHT, MARKS, dress, escaped, faint

MANY_POINTS = 60  # with more, lines have no marks
MANY_LINES = 8  # with more, there are no intervals, and a hover label is of one line
# Below a figure; plotly gives it a scroll bar where it would take more than half.
LEGEND = {"orientation": "h", "x": 0, "yref": "container", "y": 0, "yanchor": "bottom", "font": {"size": 12}}
KEY_ROW = 12  # pixels that a line's name takes below a figure; two stand in a row


@dataclass(frozen=True)
class Line:
    """Holds one line of a figure.

    Attributes:
        name: as short as `parts.short_names` makes it.
        x, y: the points; None: there is none.
        low, high: an interval around each, if known.
        look: chooses the colour, and the mark; the same number is the same model in all figures of a measure.
        variant: chooses the dash; None: as it follows from `look`.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    look: int = 0
    variant: int | None = None


def draw_lines(
    lines: Sequence[Line],
    x: str,
    y: str,
    *,
    scale: tuple[float, float] | None = None,
    doubling: bool = False,
    beside: Sequence[Line] = (),
    level: float | None = None,
    from_zero: bool = False,
) -> Any:
    """Draw lines with their intervals.

    Args:
        x, y: titles of the axes.
        scale: the ends of the y axis; None: as the numbers need it.
        doubling: draw y on a logarithmic scale, with marks at powers of two.
        beside: lines of other figures that this scale must hold too, so that all compare.
        level: a value of y to draw as a dashed line.
        from_zero: let the y axis hold 0, whatever the numbers.
    """
    figure = graph_objects.Figure()
    unified = len(lines) <= MANY_LINES
    for line in lines:
        colour = COLOURS[line.look % len(COLOURS)]
        for part in _bands(line) if unified else ():
            figure.add_scatter(
                x=part[0],
                y=part[1],
                fill="toself",
                fillcolor=faint(colour, 0.15),
                line={"color": faint(colour, 0.4), "width": 1},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
                legendgroup=str(line.name),
            )
        variant = line.look // len(COLOURS) if line.variant is None else line.variant
        figure.add_scatter(
            x=list(line.x),
            y=list(line.y),
            name=escaped(line.name),
            legendgroup=str(line.name),
            mode="lines" if len(line.x) > MANY_POINTS else "lines+markers",
            line={"color": colour, "width": 2, "dash": DASHES[variant % len(DASHES)]},
            # Hollow marks are larger, and show where two lines are the same.
            marker={"symbol": MARKS[line.look % len(MARKS)] + "-open" * (variant % 2), "size": 7 + 3 * (variant % 2)},
            hovertemplate="%{y:.4g}" if unified else "%{fullData.name}<br>%{x}: %{y:.4g}<extra></extra>",
        )
    dress(figure, HEIGHT + KEY_ROW * max(0, len(lines) - 4))
    figure.update_layout(
        hovermode="x unified" if unified else "closest",
        legend=LEGEND,
        showlegend=True,
    )
    figure.update_xaxes(
        title={"text": x},
        tickformat="d",
        unifiedhovertitle={"text": f"{x} %{{x}}"},
        spikecolor=GREY,
        spikethickness=1,
        **_whole_steps(lines),
    )
    figure.update_yaxes(title={"text": y}, tickformat=".4~g")
    if scale is not None:
        figure.update_yaxes(range=list(scale))
    if from_zero:
        figure.update_yaxes(rangemode="tozero")
    if level is not None:
        figure.add_hline(level, line={"color": GREY, "dash": "dash", "width": 1})
    if doubling:
        every = [value for line in (*lines, *beside) for values in (line.y, line.low, line.high) for value in values]
        figure.update_yaxes(**_powers_of_two([*every, level]))
    return figure


def _bands(line: Line) -> Iterator[tuple[list[float], list[float]]]:
    """Yield the outlines of a line's interval: one for each stretch of points that have one."""
    points: list[tuple[float, float, float]] = []
    for x, low, high in zip(line.x, line.low, line.high, strict=False):
        if low is not None and high is not None:
            points.append((x, low, high))
        elif points:
            yield _outline(points)
            points = []
    if points:
        yield _outline(points)


def _outline(points: Sequence[tuple[float, float, float]]) -> tuple[list[float], list[float]]:
    there = [x for x, _, _ in points]
    return [*there, *there[::-1], there[0]], [
        *(high for *_, high in points),
        *(p[1] for p in points[::-1]),
        points[0][2],
    ]


def _whole_steps(lines: Sequence[Line]) -> dict[str, Any]:
    """Return where the x axis has marks: at whole numbers, also where there is a single one."""
    places = [place for line in lines for place in line.x]
    if not places:
        return {}
    low, high = min(places), max(places)
    pad = max((high - low) * 0.03, 0.5 if high == low else 0)
    if high - low > 40:
        return {"range": [low - pad, high + pad]}
    return {"range": [low - pad, high + pad], "tick0": 0, "dtick": max(1, math.ceil((high - low) / 10))}


def _powers_of_two(values: Sequence[float | None]) -> dict[str, Any]:
    """Return a logarithmic axis that holds these values, with marks at powers of two."""
    exponents = [math.log2(value) for value in values if value is not None and value > 0]
    low, high = math.floor(min(exponents, default=0)), math.ceil(max(exponents, default=0))
    if low == high:
        low, high = low - 1, high + 1
    marks = [2.0**power for power in range(low, high + 1, max(1, math.ceil((high - low) / 8)))]
    return {
        "type": "log",
        "range": [low * math.log10(2), high * math.log10(2)],
        "tickvals": marks,
        "ticktext": [f"{mark:.4g}" for mark in marks],
    }
