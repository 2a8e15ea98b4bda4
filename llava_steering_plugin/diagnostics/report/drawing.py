"""Figures of plotly in one look: readable on light and dark pages, and by colour-blind readers.

Backgrounds are transparent, and lines and maps have colours that stand out on both. The colour of texts and grids is
the page's (style.css), which follows the reader's choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from plotly import graph_objects

# Okabe and Ito's colours that are readable on white and on black; grey takes the place of their black, and their
# yellow is left out. A dash and a mark tell apart what has the same colour.
COLOURS = ("#7f7f7f", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot")
MARKS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "triangle-down", "star")
CLEAR = "rgba(0,0,0,0)"
GREY = "#7f7f7f"
GRID = "rgba(127,127,127,0.3)"
DIVERGING = "PuOr_r"  # purple, white, orange
SEQUENTIAL = "Blues"
MANY_POINTS = 60  # with more, lines have no marks
MANY_LINES = 8  # with more, there are no intervals, and a hover label is of one line
MANY_CELLS = 8  # a side; with more, numbers do not fit into a map
HEIGHT = 380
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
                fillcolor=_faint(colour, 0.15),
                line={"color": _faint(colour, 0.4), "width": 1},
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
            marker={"symbol": MARKS[line.look % len(MARKS)], "size": 7},
            hovertemplate="%{y:.4g}" if unified else "%{fullData.name}<br>%{x}: %{y:.4g}<extra></extra>",
        )
    _dress(figure, HEIGHT + KEY_ROW * max(0, len(lines) - 4))
    figure.update_layout(
        hovermode="x unified" if unified else "closest",
        legend={"orientation": "h", "x": 0, "yref": "container", "y": 0, "yanchor": "bottom", "font": {"size": 12}},
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


def draw_map(
    values: Sequence[Sequence[float | None]],
    columns: Sequence[str],
    rows: Sequence[str],
    *,
    x: str,
    y: str,
    scale: tuple[float, float],
    colours: str = DIVERGING,
    ticks: dict[float, str],
    words: Sequence[Sequence[str]],
) -> Any:
    """Draw a heat map.

    Args:
        values: [rows][columns], the first row on top.
        x, y: titles of the axes.
        scale: the values at its ends; what lies beyond has the colour of the end.
        colours: a colour scale; the usual one is purple below the middle and orange above.
        ticks: values of the scale, with what is written there.
        words: what hover labels, and small maps, write in each cell.
    """
    small = max(len(columns), len(rows)) <= MANY_CELLS
    figure = graph_objects.Figure(
        graph_objects.Heatmap(
            z=[list(row) for row in values],
            x=list(range(len(columns))),
            y=list(range(len(rows))),
            zmin=scale[0],
            zmax=scale[1],
            colorscale=colours,
            text=[list(row) for row in words],
            texttemplate="%{text}" if small else None,
            customdata=[[[escaped(column), escaped(row)] for column in columns] for row in rows],
            hovertemplate=f"{y} %{{customdata[1]}}<br>{x} %{{customdata[0]}}<br>%{{text}}<extra></extra>",
            xgap=1,
            ygap=1,
            colorbar={
                "thickness": 10,
                "outlinewidth": 0,
                "tickvals": list(ticks),
                "ticktext": list(ticks.values()),
            },
        )
    )
    longest = max((len(name) for name in columns), default=0)
    _dress(figure, max(HEIGHT, 44 * len(rows) + 90 + 5 * longest) if small else HEIGHT + 4 * len(rows))
    for update, names, title in ((figure.update_xaxes, columns, x), (figure.update_yaxes, rows, y)):
        step = 1 if small else max(1, math.ceil(len(names) / 16))
        update(
            title={"text": title},
            tickvals=list(range(0, len(names), step)),
            ticktext=[escaped(name) for name in names[::step]],
            showgrid=False,
        )
    figure.update_xaxes(tickangle=-40 if longest > 3 else 0)
    figure.update_yaxes(autorange="reversed")
    return figure


def escaped(name: str) -> str:
    """Return a name as plotly shows it: it takes some HTML for itself, and what stands in %{...} for a value."""
    return name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%{", "%\N{ZERO WIDTH SPACE}{")


def _dress(figure: Any, height: int) -> None:
    """Give a figure the look that all have."""
    figure.update_layout(
        template="none",
        height=height,
        autosize=True,
        margin={"l": 8, "r": 8, "t": 28, "b": 8},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        font={"family": "system-ui, sans-serif", "size": 13, "color": GREY},
        hoverlabel={"bgcolor": "#ffffff", "bordercolor": GREY, "font": {"color": "#1a1a1a"}, "namelength": -1},
        modebar={"bgcolor": CLEAR, "color": GREY, "activecolor": COLOURS[1], "orientation": "h"},
        dragmode=False,  # a finger on a phone scrolls the page
    )
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(automargin=True, gridcolor=GRID, zeroline=False, linecolor=GRID, title={"standoff": 8})


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


def _faint(colour: str, strength: float) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{strength})"


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
        "ticktext": [f"{mark:.3g}" for mark in marks],
    }
