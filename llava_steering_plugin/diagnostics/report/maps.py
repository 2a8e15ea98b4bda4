"""Heat maps, drawn by plotly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from plotly import graph_objects

from llava_steering_plugin.diagnostics.report.look import HEIGHT, dress, escaped
from llava_steering_plugin.diagnostics.report.parts import NONE

DIVERGING = "PuOr_r"  # purple, white, orange
SEQUENTIAL = "Blues"
# Over an image, as in the pictures of diagnose image: dark to light, and orange (negative) over white to purple.
SHARES, SIGNED = "Viridis", "PuOr"
MANY_CELLS = 8  # a side; with more, numbers do not fit into a map
TALLEST = 900  # pixels


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
    dress(figure, max(HEIGHT, 44 * len(rows) + 90 + 5 * longest) if small else min(TALLEST, HEIGHT + 4 * len(rows)))
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


def draw_overlay(
    picture: Mapping[str, Any],
    boxes: Sequence[Sequence[float]],
    values: Sequence[Sequence[float | None]] = (),
    *,
    box: Sequence[float] = (),
    scale: tuple[float, float] = (0, 1),
    colours: str = SHARES,
    marked: Sequence[tuple[int, int]] = (),
) -> Any:
    """Draw a map of patches over an image, or the image alone.

    Args:
        picture: `thumbnail`, a data URL, and the `width` and `height` of the coordinates.
        boxes: left, top, right, bottom of all maps over this image; the figure shows them whole.
        values: [rows][columns] of the map.
        box: where the map lies.
        scale: the values at the ends of the colours.
        marked: row and column of patches that are crossed out.
    """
    width, height = float(picture["width"]), float(picture["height"])
    figure = graph_objects.Figure()
    # An image alone is no trace, and plotly draws no axes without one.
    figure.add_scatter(x=[0, width], y=[0, height], mode="markers", marker={"opacity": 0}, hoverinfo="skip")
    if values:
        left, top, right, bottom = map(float, box)
        across, down = (right - left) / len(values[0]), (bottom - top) / len(values)
        figure.add_heatmap(
            z=[list(row) for row in values],
            x0=left + across / 2,
            dx=across,
            y0=top + down / 2,
            dy=down,
            zmin=scale[0],
            zmax=scale[1],
            colorscale=colours,
            opacity=0.65,
            hovertemplate="%{z:.4g}<extra></extra>",
            colorbar={"thickness": 10, "outlinewidth": 0, "tickformat": ".3~g", "nticks": 5},
        )
        figure.add_scatter(
            x=[left + (column + 0.5) * across for _, column in marked],
            y=[top + (row + 0.5) * down for row, _ in marked],
            mode="markers",
            marker={"symbol": "x-thin", "size": 10, "line": {"color": "#ffffff", "width": 2}},
            hoverinfo="skip",
        )
    figure.add_layout_image(
        source=picture["thumbnail"],
        xref="x",
        yref="y",
        x=0,
        y=0,
        sizex=width,
        sizey=height,
        sizing="stretch",
        layer="below",
    )
    dress(figure, HEIGHT)
    figure.update_layout(showlegend=False)
    edges = [(0, 0, width, height), *(tuple(map(float, each)) for each in boxes)]
    ends = [end(edge[number] for edge in edges) for number, end in enumerate((min, min, max, max))]
    figure.update_xaxes(range=[ends[0], ends[2]], showgrid=False, showticklabels=False, ticks="", constrain="domain")
    figure.update_yaxes(range=[ends[3], ends[1]], showgrid=False, showticklabels=False, ticks="", constrain="domain")
    figure.update_yaxes(scaleanchor="x")
    return figure


def draw_shares(
    values: Sequence[Sequence[float | None]], columns: Sequence[str], rows: Sequence[str], *, x: str, y: str
) -> Any:
    """Draw a heat map of numbers from 0 to 1, with two digits of each; the arguments are those of `draw_map`."""
    return draw_map(
        values,
        columns,
        rows,
        x=x,
        y=y,
        scale=(0, 1),
        colours=SEQUENTIAL,
        ticks={0: "0", 0.5: "0.5", 1: "1"},
        words=[[NONE if value is None else f"{value:.2f}" for value in row] for row in values],
    )
