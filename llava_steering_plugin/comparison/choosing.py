"""Choose the learning rate of each method on the validation split."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava_steering_plugin.comparison.records import DONE, FAILED, Record


@dataclass(frozen=True)
class Choice:
    """Holds the learning rate that a method is tested with.

    Attributes:
        rate: None: none can be chosen.
        scores: by learning rate, the mean over seeds and tests; None where a seed has none.
        reason: why none can be chosen.
    """

    rate: float | None
    scores: Mapping[float, float | None]
    reason: str | None = None


def choose(records: Sequence[Record], rates: Sequence[float], seeds: Sequence[int]) -> Choice:
    """Choose the rate with the best mean over all seeds and tests of the validation split; of equal ones the smallest.

    A rate at which a seed has diverged is out. Where a cell has failed, nothing is chosen: the method would have had a
    smaller budget than the others.

    Args:
        records: of one method and task on the validation split; all cells have ended.
    """
    of = {(record.learning_rate, record.seed): record for record in records}
    failed = sum(record.status == FAILED for record in records)
    scores: dict[float, float | None] = {}
    for rate in rates:
        cells = [of.get((rate, seed)) for seed in seeds]
        means = [
            statistics.mean(score.score for score in cell.scores.values())
            for cell in cells
            if cell is not None and cell.status == DONE
        ]
        scores[rate] = statistics.mean(means) if len(means) == len(seeds) else None
    if failed:
        return Choice(None, scores, f"{failed} of its cells failed; once they are done, it is chosen and tested")
    known = {rate: score for rate, score in scores.items() if score is not None}
    if not known:
        return Choice(None, scores, "every learning rate diverged; give it smaller ones")
    return Choice(min(known, key=lambda rate: (-known[rate], rate)), scores)
