"""Give means over samples their bootstrap intervals, as JSON has them. scipy is imported when it is needed."""

from __future__ import annotations

from typing import Any

import numpy

CONFIDENCE = 0.95
RESAMPLES = 2_000
BATCH = 2_000_000  # numbers that are resampled at a time


def with_interval(table: Any) -> dict[str, list[float | None]]:
    """Return the mean over samples of every column, and its bootstrap interval (percentile).

    All columns are resampled together, so values that are differences within a sample give paired intervals.

    Args:
        table: numbers [samples, columns]; samples in which a number is not defined are left out.

    Returns:
        `mean`, `low` and `high`, [columns] each; the interval is null for fewer than two samples.
    """
    values = numpy.asarray(table, dtype=numpy.float64)
    if values.ndim != 2:
        return {"mean": [], "low": [], "high": []}
    values = values[numpy.isfinite(values).all(1)]
    if len(values) < 2:
        unknown: list[float | None] = [None] * values.shape[1]
        return {"mean": plain(values[0]) if len(values) else unknown, "low": unknown, "high": unknown}
    from scipy import stats

    found = stats.bootstrap(
        (values,),
        numpy.mean,
        axis=0,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        batch=max(1, BATCH // values.size),
        random_state=numpy.random.default_rng(0),
    ).confidence_interval
    return {"mean": plain(values.mean(0)), "low": plain(found.low), "high": plain(found.high)}


def one_with_interval(values: Any) -> dict[str, float | None]:
    """Return the same for a single column, [samples]: a number each."""
    table = numpy.asarray(values, dtype=numpy.float64).reshape(-1, 1)
    return {name: column[0] for name, column in with_interval(table).items()}


def plain(values: Any) -> list[float | None]:
    """Return numbers as JSON has them, with six digits: null for those that are not defined."""
    return [float(f"{value:.6g}") if numpy.isfinite(value) else None for value in numpy.asarray(values)]
