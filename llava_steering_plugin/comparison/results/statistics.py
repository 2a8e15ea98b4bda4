"""Compute means and spreads over seeds, and differences that are paired by seed and question.

A difference has an interval by the bootstrap for two crossed factors (Owen 2007, "The pigeonhole bootstrap", arXiv
0712.1111): all seeds answer the same questions, so seeds are drawn with replacement, questions are drawn with
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


def paired(method: Mapping[int, Points], reference: Mapping[int, Points]) -> Difference | None:
    """Return how much more a question is worth with a method than with the reference, in percent.

    Args:
        method, reference: the points of each question, by seed. Seeds and questions that one of them lacks are left
            out: questions that one seed lacks are left out for all, so that the seeds stay crossed with them.

    Returns:
        None: they share no seed, or no question.
    """
    seeds = sorted(method.keys() & reference.keys())
    if not seeds:
        return None
    shared = set.intersection(*(set(each[seed]) for each in (method, reference) for seed in seeds))
    questions = sorted(shared)
    if not questions:
        return None
    table = numpy.array([[method[seed][key] - reference[seed][key] for key in questions] for seed in seeds])
    low, high = interval(table)
    return Difference(100 * float(table.mean()), _percent(low), _percent(high), len(seeds), len(questions))


def paired_by_seed(method: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Return the mean difference of two scores over the seeds that both have; without questions, no interval."""
    seeds = sorted(method.keys() & reference.keys())
    if not seeds:
        return None
    mean = math.fsum(method[seed] - reference[seed] for seed in seeds) / len(seeds)
    return Difference(mean, None, None, len(seeds), 0)


def interval(
    table: NDArray[numpy.float64], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float | None, float | None]:
    """Return the bootstrap interval (percentile) of the mean of a table, whose rows and columns are both drawn.

    Args:
        table: numbers [seeds, questions]. A single row is drawn always, so its interval is over questions alone.
    """
    seeds, questions = table.shape
    if seeds * questions < 2:
        return None, None
    random = numpy.random.default_rng(seed)
    means = numpy.empty(resamples)
    for place in range(resamples):
        row = table[0]
        if seeds > 1:
            row = table[random.integers(0, seeds, seeds)].mean(0)
        means[place] = row[random.integers(0, questions, questions)].mean()
    ends = (1 - CONFIDENCE) / 2
    low, high = numpy.quantile(means, (ends, 1 - ends))
    return float(low), float(high)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
