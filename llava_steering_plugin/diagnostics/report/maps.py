"""Heat maps, drawn by plotly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from plotly import graph_objects

from llava_steering_plugin.diagnostics.report.look import HEIGHT, dress, escaped

DIVERGING = "PuOr_r"  # purple, white, orange
SEQUENTIAL = "Blues"
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
