"""How much a router's choice says about the task: mutual information, from counts, as a share of the task's entropy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

SHUFFLES = 5


def entropy(labels: Sequence[Hashable]) -> float:
    """Of how often each label occurs, in nats."""
    shares = np.array(list(Counter(labels).values())) / len(labels)
    return float(-(shares * np.log(shares)).sum())


def mutual_information(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Between two labellings of the same things, in nats; estimated from counts, so rather too high for few things."""
    return max(0.0, entropy(first) + entropy(second) - entropy(list(zip(first, second, strict=True))))


def told(tasks: Sequence[Hashable], choices: Sequence[Hashable], seed: int = 0) -> tuple[float, float]:
    """Mutual information of task and choice over the entropy of the task, from 0 to 1; and what chance alone gives.

    Chance: the same with the tasks shuffled, the mean of a few times. It is above 0 because questions are few.

    Raises:
        ValueError: all are of one task, so that there is nothing to tell.
    """
    whole = entropy(tasks)
    if whole == 0:
        raise ValueError("all questions are of one task; nothing can be told apart")
    places = np.random.default_rng(seed)
    by_chance = [
        mutual_information([tasks[place] for place in places.permutation(len(tasks))], choices) for _ in range(SHUFFLES)
    ]
    return mutual_information(tasks, choices) / whole, float(np.mean(by_chance)) / whole


def of_linears(tasks: Sequence[str], chosen: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """`told` for every router, by name.

    Args:
        tasks: the task of each question.
        chosen: by router, int [questions, r], the factors that it chose; their order is no matter.
    """
    found = {}
    for name, factors in chosen.items():
        sets = [tuple(row) for row in np.sort(factors, axis=1).tolist()]
        share, chance = told(tasks, sets)
        found[name] = {"told": share, "chance": chance, "sets": float(len(set(sets)))}
    return found


def mean_of(linears: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean over all routers, figure by figure."""
    figures = next(iter(linears.values()))
    return {figure: float(np.mean([values[figure] for values in linears.values()])) for figure in figures}
