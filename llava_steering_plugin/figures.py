"""Make figures of matplotlib that look alike, and write them as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_steering_plugin.errors import ArgumentsError

# Okabe and Ito's colours, which colour-blind readers can tell apart, and a mark for each, for prints without colour.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKS = "osD^vPX"
FORMATS = ("png", "svg")


def look_of(number: int) -> dict[str, str]:
    """Return colour and mark of the model or task of that number: the first 49 have different ones."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKS[(number + number // len(COLOURS)) % len(MARKS)],
    }


def new_figure(size: tuple[float, float]) -> Any:
    """Return an empty figure of matplotlib, of this width and height in inches.

    Raises:
        ArgumentsError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentsError(
            "pictures need matplotlib: pip install -e '.[diagnostics]' in this plugin's folder"
        ) from error
    return Figure(figsize=size, layout="constrained")


def save_figure(figure: Any, target: Path) -> list[Path]:
    """Write a figure of matplotlib in all `FORMATS`, the same bytes for the same figure.

    Raises:
        ArgumentsError: a file cannot be written.
    """
    import matplotlib

    files = [target.with_name(f"{target.name}.{ending}") for ending in FORMATS]
    with matplotlib.rc_context({"svg.hashsalt": target.name, "svg.fonttype": "none"}):
        for file in files:
            metadata = {"Date": None} if file.suffix == ".svg" else None
            try:
                figure.savefig(file, dpi=150, metadata=metadata)
            except OSError as error:
                raise ArgumentsError(f"{file} cannot be written: {error.strerror}.") from error
    return files
