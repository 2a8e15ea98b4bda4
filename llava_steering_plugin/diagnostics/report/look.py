"""The look that all figures of a report have: readable on light and dark pages, and by colour-blind readers.

Backgrounds are transparent, and lines and maps have colours that stand out on both. The colour of texts and grids is
the page's (style.css), which follows the reader's choice.
"""

from __future__ import annotations

from typing import Any

# Okabe and Ito's colours that are readable on white and on black; grey takes the place of their black, and their
# yellow is left out. A dash and a mark tell apart what has the same colour.
COLOURS = ("#7f7f7f", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot")
MARKS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "triangle-down", "star")
CLEAR = "rgba(0,0,0,0)"
GREY = "#7f7f7f"
GRID = "rgba(127,127,127,0.3)"
HEIGHT = 380


def escaped(name: str) -> str:
    """Return a name as plotly shows it: it takes some HTML for itself, and what stands in %{...} for a value."""
    return name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%{", "%\N{ZERO WIDTH SPACE}{")


def dress(figure: Any, height: int) -> None:
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


def faint(colour: str, strength: float) -> str:
    """Return a colour, "#rrggbb", that lets others through."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{strength})"
