"""Make figures of several plots side by side, without a display."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def side_by_side(path: Path, size: tuple[float, float], widths: Sequence[float]) -> Iterator[Sequence[Any]]:
    """Yield one pair of axes for each of the relative `widths`; save the figure to `path` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(widths), figsize=size, width_ratios=widths, constrained_layout=True)
    yield axes
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
