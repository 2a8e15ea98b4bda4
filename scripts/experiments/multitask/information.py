"""Measure how much a router's choice tells about the task: mutual information, as a share of the task's entropy."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import mutual_info_score

Labels = Sequence[Hashable]

SHUFFLES = 5


def entropy(labels: Labels) -> float:
    """Return the entropy of the labels' frequencies, in nats: what they tell about themselves."""
    return mutual_information(labels, labels)


def mutual_information(first: Labels, second: Labels) -> float:
    """Return the mutual information of two labellings of the same things, in nats.

    It is estimated from counts, so it is too high for few things.
    """
    return float(mutual_info_score(_numbers(first), _numbers(second)))


def _numbers(labels: Labels) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Return a number from 0 for each label: scikit-learn takes no tuples."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(label, len(known)) for label in labels], dtype=np.intp)


def told(tasks: Labels, choices: Labels, seed: int = 0) -> tuple[float, float]:
    """Return the mutual information of task and choice over the entropy of the task, from 0 to 1, and its chance level.

    The chance level is the mean of the same over shuffled tasks. It is above 0 because there are few questions.

    Raises:
        ValueError: all questions are of one task.
    """
    whole = entropy(tasks)
    if whole == 0:
        raise ValueError("all questions are of one task; give questions of two or more tasks")
    places = np.random.default_rng(seed)
    by_chance = [
        mutual_information([tasks[place] for place in places.permutation(len(tasks))], choices) for _ in range(SHUFFLES)
    ]
    return mutual_information(tasks, choices) / whole, float(np.mean(by_chance)) / whole


def of_linears(tasks: Sequence[str], chosen: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, dict[str, float]]:
    """Return `told` for every router, by name.

    Args:
        tasks: the task of each question.
        chosen: by router, int [questions, r], the factors that it chose, in any order.
    """
    found = {}
    for name, factors in chosen.items():
        sets = [tuple(row) for row in np.sort(factors, axis=1).tolist()]
        share, chance = told(tasks, sets)
        found[name] = {"told": share, "chance": chance, "sets": float(len(set(sets)))}
    return found


def mean_of(linears: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each figure over all routers."""
    figures = next(iter(linears.values()))
    return {figure: float(np.mean([values[figure] for values in linears.values()])) for figure in figures}
