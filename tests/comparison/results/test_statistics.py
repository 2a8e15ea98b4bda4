"""Means, spreads and paired differences are those of hand-computed cases, numpy and scipy; intervals cover."""

from __future__ import annotations

import numpy
import pytest
from scipy import stats

from llava_steering_plugin.comparison.results.statistics import (
    Difference,
    Spread,
    interval,
    paired,
    paired_by_seed,
    spread_of,
)


def test_a_spread_is_the_mean_and_the_deviation_of_a_sample() -> None:
    assert spread_of([60.0, 62.0, 67.0]) == Spread(63.0, pytest.approx(numpy.std([60, 62, 67], ddof=1)), 3)
    assert spread_of([60.0]) == Spread(60.0, None, 1)
    assert spread_of([]) is None


def test_a_difference_is_paired_by_seed_and_question() -> None:
    method = {1: {"a": 1.0, "b": 1.0}, 2: {"a": 1.0, "b": 0.0}, 3: {"a": 1.0, "b": 1.0}}
    reference = {1: {"a": 1.0, "b": 0.0}, 2: {"a": 0.0, "b": 0.5}}
    found = paired((method, reference))
    # Seed 3 has no partner. Of seeds 1 and 2: 0, 1; 1, -0.5.
    assert found is not None and found.mean == pytest.approx(100 * (0 + 1 + 1 - 0.5) / 4)
    assert (found.seeds, found.questions) == (2, 2)
    assert found.low is not None and found.high is not None and found.low < found.mean < found.high


def test_the_order_of_questions_in_the_files_makes_no_difference() -> None:
    one = {1: {"a": 1.0, "b": 0.0, "c": 1.0}}
    other = {1: {"c": 0.0, "a": 0.0, "b": 1.0}}
    assert paired((one, other)) == paired(({1: dict(reversed(one[1].items()))}, other))


def test_a_question_that_one_seed_lacks_is_left_out_for_all() -> None:
    method = {1: {"a": 1.0, "b": 1.0}, 2: {"a": 1.0}}
    reference = {1: {"a": 0.0, "b": 1.0}, 2: {"a": 1.0, "b": 0.0}}
    found = paired((method, reference))
    assert found is not None and (found.mean, found.seeds, found.questions) == (50.0, 2, 1)


@pytest.mark.parametrize(
    ("method", "reference"), [({1: {"a": 1.0}}, {2: {"a": 1.0}}), ({1: {"a": 1.0}}, {1: {"b": 1.0}}), ({}, {})]
)
def test_without_a_shared_seed_or_question_there_is_no_difference(
    method: dict[int, dict[str, float]], reference: dict[int, dict[str, float]]
) -> None:
    assert paired((method, reference)) is None


def test_a_single_pair_has_no_interval_and_equal_methods_have_one_of_no_width() -> None:
    assert paired(({1: {"a": 1.0}}, {1: {"a": 0.0}})) == Difference(100.0, None, None, 1, 1)
    same = {seed: {"a": 1.0, "b": 0.0} for seed in (1, 2)}
    assert paired((same, same)) == Difference(0.0, 0.0, 0.0, 2, 2)


def test_of_several_tests_each_counts_as_much_as_another_and_seeds_are_those_of_all() -> None:
    short = ({1: {"a": 1.0}, 2: {"a": 1.0}}, {1: {"a": 0.0}, 2: {"a": 1.0}})
    long = (
        {1: {"a": 0.0, "b": 0.0}, 2: {"a": 1.0, "b": 0.0}, 3: {"a": 1.0}},
        {1: {"a": 1.0, "b": 1.0}, 2: {"a": 1.0, "b": 0.0}},
    )
    found = paired(short, long)
    # Over seeds 1 and 2: (1 + 0) / 2, and (-1 - 1 + 0 + 0) / 4.
    assert found is not None and (found.mean, found.seeds, found.questions) == (0.0, 2, 3)
    assert paired(short, ({1: {"a": 1.0}}, {1: {"b": 1.0}})) is None


def test_the_interval_of_a_mean_of_tests_draws_questions_within_each() -> None:
    random = numpy.random.default_rng(10)
    few, many = random.normal(0, 1, (1, 40)), random.normal(0, 1, (1, 400))
    low, high = interval(few, many, resamples=4000)
    assert low is not None and high is not None
    deviation = numpy.sqrt(few.var() / 40 + many.var() / 400) / 2
    assert (high - low) / (2 * 1.96) == pytest.approx(deviation, rel=0.06)
    assert interval(few, few.copy())[0] != interval(few)[0], "each draws for itself"


def test_scores_without_questions_are_paired_by_seed_and_have_no_interval() -> None:
    assert paired_by_seed({1: 60.0, 2: 70.0, 4: 0.0}, {1: 50.0, 2: 66.0, 3: 1.0}) == Difference(7.0, None, None, 2, 0)
    assert paired_by_seed({1: 60.0}, {2: 50.0}) is None


def test_with_one_seed_the_interval_is_scipys_over_questions() -> None:
    values = numpy.random.default_rng(5).normal(0.1, 1, 40)
    ours = interval(values[None], resamples=1000)
    random = numpy.random.default_rng(0)
    theirs = stats.bootstrap(
        (values,), numpy.mean, n_resamples=1000, method="percentile", random_state=random
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_with_one_question_the_interval_is_scipys_over_seeds() -> None:
    values = numpy.random.default_rng(6).normal(0, 1, 30)
    ours = interval(values[:, None], resamples=4000)
    theirs = stats.bootstrap((values,), numpy.mean, method="percentile", random_state=1).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.05)


def test_the_interval_has_the_deviation_of_both_factors() -> None:
    """Rows and columns that differ by a normal effect each: the variances of their means add up."""
    random = numpy.random.default_rng(7)
    seeds, questions = random.normal(0, 0.3, 12), random.normal(0, 1, 200)
    low, high = interval(seeds[:, None] + questions[None], resamples=4000)
    deviation = numpy.sqrt(seeds.var() / 12 + questions.var() / 200)
    assert low is not None and high is not None
    assert (high - low) / (2 * 1.96) == pytest.approx(deviation, rel=0.08)


def test_intervals_cover_the_difference_that_is_there() -> None:
    """Of 100 experiments with 8 seeds and 60 questions, about 95 intervals hold the truth; 86 at least."""
    random, held = numpy.random.default_rng(8), 0
    for _ in range(100):
        seeds, questions = random.normal(0, 0.1, (8, 1)), random.normal(0, 0.3, (1, 60))
        low, high = interval(0.2 + seeds + questions + random.normal(0, 0.2, (8, 60)), resamples=300)
        assert low is not None and high is not None
        held += low <= 0.2 <= high
    assert held >= 86


def test_the_same_table_gives_the_same_interval() -> None:
    table = numpy.random.default_rng(9).normal(0, 1, (3, 20))
    assert interval(table) == interval(table) != interval(table, seed=1)
