"""Compute means and spreads over seeds, and differences that are paired by seed and question.

A difference has an interval by the bootstrap for two crossed factors (Owen 2007, "The pigeonhole bootstrap", doi
10.1214/07-AOAS122): all seeds answer the same questions, so seeds are drawn with replacement, questions are drawn with
replacement, and every drawn seed keeps the drawn questions. Drawing other questions for each seed would take one
question's difficulty for several independent ones, and the interval would be too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 2_000

# What each question is worth, by its id.
Points = Mapping[str, float]


@dataclass(frozen=True)
class Spread:
    """Holds a mean over seeds.

    Attributes:
        deviation: the standard deviation of a sample; None for fewer than two seeds.
        count: of how many seeds.
    """

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """Holds a mean difference from the reference, over the seeds and questions that both have.

    Attributes:
        low, high: the ends of the interval; None where there are no scores of single questions, or one pair.
        questions: how many were paired; 0 where only seeds were.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int
    questions: int


def spread_of(values: Sequence[float]) -> Spread | None:
    """Return the mean and the standard deviation of a sample; None: there are no values."""
    if not values:
        return None
    deviation = float(numpy.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(math.fsum(values) / len(values), deviation, len(values))


def paired(*tests: tuple[Mapping[int, Points], Mapping[int, Points]]) -> Difference | None:
    """Return how much more a question is worth with a method than with the reference, in percent.

    Args:
        tests: of each test, the points of each question by seed: the method's and the reference's. Seeds that one of
            them lacks are left out. Questions that one seed lacks are left out for all, so that the seeds stay crossed
            with them. Of several tests, the mean is returned: each counts as much as another.

    Returns:
        None: they share no seed, or no question of some test.
    """
    seeds = sorted(set.intersection(*(set(each) for test in tests for each in test)))
    if not seeds:
        return None
    tables = []
    for method, reference in tests:
        shared = set.intersection(*(set(each[seed]) for each in (method, reference) for seed in seeds))
        if not shared:
            return None
        questions = sorted(shared)
        rows = [[method[seed][key] - reference[seed][key] for key in questions] for seed in seeds]
        tables.append(numpy.array(rows, dtype=numpy.float64))
    mean = math.fsum(float(table.mean()) for table in tables) / len(tables)
    low, high = interval(*tables)
    count = sum(table.shape[1] for table in tables)
    return Difference(100 * mean, _percent(low), _percent(high), len(seeds), count)


def paired_by_seed(method: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Return the mean difference of two scores over the seeds that both have; without questions, no interval."""
    seeds = sorted(method.keys() & reference.keys())
    if not seeds:
        return None
    mean = math.fsum(method[seed] - reference[seed] for seed in seeds) / len(seeds)
    return Difference(mean, None, None, len(seeds), 0)


def interval(
    *tables: NDArray[numpy.float64], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float | None, float | None]:
    """Return the bootstrap interval (percentile) of the mean of a table, whose rows and columns are both drawn.

    Args:
        tables: numbers [seeds, questions]. Of several, the interval is that of the mean of their means: the same seeds
            are drawn for all, and questions within each. A single row is drawn always, so its interval is over
            questions alone.
    """
    seeds = tables[0].shape[0]
    if sum(table.size for table in tables) < 2:
        return None, None
    random = numpy.random.default_rng(seed)
    means = numpy.zeros(resamples)
    for place in range(resamples):
        drawn = random.integers(0, seeds, seeds) if seeds > 1 else None
        for table in tables:
            row = table[0] if drawn is None else table[drawn].mean(0)
            means[place] += row[random.integers(0, len(row), len(row))].mean() / len(tables)
    ends = (1 - CONFIDENCE) / 2
    low, high = numpy.quantile(means, (ends, 1 - ends))
    return float(low), float(high)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
