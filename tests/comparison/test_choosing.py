"""The learning rate with the best mean on validation is chosen, and none that lost a seed."""

from __future__ import annotations

import pytest

from llava_steering_plugin.comparison.choosing import choose
from llava_steering_plugin.comparison.records import DIVERGED, DONE, FAILED, VALIDATION, Record, Score


def record(rate: float, seed: int, *scores: float, status: str = DONE) -> Record:
    tests = {str(place): Score("gqa", score, 10, "a", "b") for place, score in enumerate(scores)}
    return Record(f"{rate}-{seed}", "t", "m", {}, rate, seed, VALIDATION, status, scores=tests)


def test_the_best_mean_over_seeds_and_tests_is_chosen() -> None:
    records = [record(0.1, 1, 50, 70), record(0.1, 2, 60, 60), record(0.2, 1, 90, 90), record(0.2, 2, 10, 10)]
    found = choose(records, (0.1, 0.2), (1, 2))
    assert (found.rate, found.scores) == (0.1, {0.1: 60, 0.2: 50})


def test_of_equal_ones_the_smallest_is_chosen_whatever_their_order() -> None:
    records = [record(0.2, 1, 50), record(0.1, 1, 50)]
    assert choose(records, (0.2, 0.1), (1,)).rate == 0.1


def test_a_rate_that_lost_a_seed_is_out() -> None:
    records = [record(0.1, 1, 50), record(0.1, 2, 50), record(0.2, 1, 99), record(0.2, 2, status=DIVERGED)]
    found = choose(records, (0.1, 0.2), (1, 2))
    assert (found.rate, found.scores[0.2]) == (0.1, None)


@pytest.mark.parametrize(("status", "said"), [(FAILED, "1 of its cells failed"), (DIVERGED, "every learning rate")])
def test_nothing_is_chosen_from_a_smaller_budget_or_from_nothing(status: str, said: str) -> None:
    other = record(0.2, 1, 50) if status == FAILED else record(0.2, 1, status=DIVERGED)
    found = choose([record(0.1, 1, status=status), other], (0.1, 0.2), (1,))
    assert found.rate is None and said in (found.reason or "")
