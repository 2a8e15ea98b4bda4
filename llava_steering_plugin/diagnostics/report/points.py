"""Points with their intervals, over places, numbers or a plane, drawn by plotly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plotly import graph_objects

from llava_steering_plugin.diagnostics.report.lines import KEY_ROW, LEGEND
from llava_steering_plugin.diagnostics.report.look import COLOURS, DASHES, GREY, HEIGHT, MARKS, dress, escaped

Interval = tuple[float | None, float | None, float | None]  # low, mean, high


def draw_points(
    series: Mapping[str, Sequence[Interval]], places: Sequence[str], y: str, *, scale: tuple[float, float]
) -> Any:
    """Draw points with their intervals, those of all series beside each other at each place.

    Args:
        series: a value for each place, by the name of the series.
        places: what stands below each place; a line break is `<br>`.
        y: title of the axis.
        scale: its ends.
    """
    figure = graph_objects.Figure()
    for number, (name, values) in enumerate(series.items()):
        beside = (number - (len(series) - 1) / 2) * 0.7 / len(series)
        known = [
            (place + beside, low if low is not None else mean, mean, high if high is not None else mean)
            for place, (low, mean, high) in enumerate(values)
            if mean is not None
        ]
        figure.add_scatter(
            x=[x for x, *_ in known],
            y=[mean for _, _, mean, _ in known],
            error_y={
                "array": [high - mean for _, _, mean, high in known],
                "arrayminus": [mean - low for _, low, mean, _ in known],
                "thickness": 1,
                "width": 3,
            },
            name=escaped(name),
            mode="markers",
            marker={"color": COLOURS[number % len(COLOURS)], "symbol": MARKS[number % len(MARKS)], "size": 8},
            customdata=[[low, high] for _, low, _, high in known],
            hovertemplate="%{fullData.name}<br>%{y:.4g} (%{customdata[0]:.4g} to %{customdata[1]:.4g})<extra></extra>",
        )
    dress(figure, HEIGHT + KEY_ROW * max(0, len(series) - 4))
    figure.update_layout(legend=LEGEND, showlegend=True, hovermode="closest")
    figure.update_xaxes(tickvals=list(range(len(places))), ticktext=list(places), range=[-0.5, len(places) - 0.5])
    figure.update_yaxes(title={"text": y}, range=list(scale), tickformat=".4~g")
    figure.add_hline(0, line={"color": GREY, "dash": DASHES[1], "width": 1})
    return figure


@dataclass(frozen=True)
class Dot:
    """Holds a point and its name.

    Attributes:
        deviation: drawn below and above it; None: it has none.
        look: chooses colour and mark.
    """

    name: str
    x: float
    y: float | None
    deviation: float | None
    look: int


def draw_dots(dots: Sequence[Dot], x: str, y: str, *, level: float | None = None) -> Any:
    """Draw points over a logarithmic axis, each with its name in the key.

    Args:
        x, y: titles of the axes.
        level: a value of y to draw as a dashed line.
    """
    figure = graph_objects.Figure()
    for dot in dots:
        figure.add_scatter(
            x=[dot.x],
            y=[dot.y],
            error_y={"array": [dot.deviation or 0], "thickness": 1, "width": 3},
            name=escaped(dot.name),
            mode="markers",
            marker={"color": COLOURS[dot.look % len(COLOURS)], "symbol": MARKS[dot.look % len(MARKS)], "size": 9},
            hovertemplate="%{fullData.name}<br>%{x:,}: %{y:.4g} ± %{error_y.array:.3g}<extra></extra>",
        )
    dress(figure, HEIGHT + KEY_ROW * max(0, len(dots) - 4))
    figure.update_layout(legend=LEGEND, showlegend=True, hovermode="closest")
    figure.update_xaxes(title={"text": x}, type="log", dtick=1)
    figure.update_yaxes(title={"text": y}, tickformat=".4~g")
    if level is not None:
        figure.add_hline(level, line={"color": GREY, "dash": DASHES[1], "width": 1})
    return figure


def draw_plane(groups: Mapping[str, Sequence[Sequence[float | None]]]) -> Any:
    """Draw points in a plane whose axes mean nothing, with a colour for each group.

    Args:
        groups: places [points][2] by the name of the group.
    """
    figure = graph_objects.Figure()
    for number, (name, points) in enumerate(groups.items()):
        figure.add_scatter(
            x=[point[0] for point in points],
            y=[point[1] for point in points],
            name=escaped(name),
            mode="markers",
            marker={
                "color": COLOURS[number % len(COLOURS)],
                "symbol": MARKS[number % len(MARKS)],
                "size": 8,
                "opacity": 0.8,
            },
            hovertemplate="%{fullData.name}<extra></extra>",
        )
    dress(figure, HEIGHT + KEY_ROW * max(0, len(groups) - 4))
    figure.update_layout(legend=LEGEND, showlegend=True, hovermode="closest")
    figure.update_xaxes(showticklabels=False)
    figure.update_yaxes(showticklabels=False, scaleanchor="x")
    return figure
