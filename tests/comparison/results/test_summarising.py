"""Records become means, paired differences and costs.

Covers `comparison/results/summarising.py`, `comparison/results/outcomes.py` and `comparison/results/summary.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from comparison_records import BASE, record

from llava_steering_plugin.comparison.records import DIVERGED, FAILED, VALIDATION, Record
from llava_steering_plugin.comparison.results.outcomes import MEAN
from llava_steering_plugin.comparison.results.statistics import Difference, Spread
from llava_steering_plugin.comparison.results.summarising import summarise
from llava_steering_plugin.comparison.results.summary import Outcome, Reached
from llava_steering_plugin.errors import ArgumentsError

HALF = [1.0, 1.0, 0.0, 0.0]


def of(records: list[Record], output: Path, reference: str | None = None) -> dict[str, Reached]:
    (task,) = summarise(records, output, reference).tasks
    return {one.method: one for one in task.methods}


def test_methods_differ_from_the_first_that_is_trained_by_seed_and_question(tmp_path: Path) -> None:
    records = [
        record(tmp_path, BASE, 1, [0, 0, 0, 1]),
        record(tmp_path, "A", 1, HALF),
        record(tmp_path, "A", 2, [1, 1, 1, 0]),
        record(tmp_path, "B", 1, [1, 1, 0, 1]),
        record(tmp_path, "B", 2, [1, 1, 1, 1]),
    ]
    found = of(records, tmp_path)
    first, other, base = (found[name].outcomes["held out"] for name in ("A", "B", BASE))
    assert first == Outcome(Spread(62.5, pytest.approx(12.5 * 2**0.5), 2), 4)
    assert other.score == Spread(87.5, pytest.approx(12.5 * 2**0.5), 2)
    assert other.difference is not None and (other.difference.mean, other.difference.seeds) == (25.0, 2)
    # The base has one run, and stands beside both seeds: (25 - 50 + 25 - 75) / 2.
    assert base.score == Spread(25.0, None, 1)
    assert base.difference is not None and (base.difference.mean, base.difference.seeds) == (-37.5, 2)
    assert found[BASE].frozen and found[BASE].rate is None and found["A"].rate == 0.01
    assert of(records, tmp_path, "B")["A"].outcomes["held out"].difference.mean == -25.0  # type: ignore[union-attr]
    assert of(records, tmp_path, BASE)["A"].outcomes["held out"].difference.mean == 37.5  # type: ignore[union-attr]


def test_a_seed_that_failed_is_counted_and_its_partner_left_out_of_the_difference(tmp_path: Path) -> None:
    records = [record(tmp_path, "A", seed, HALF) for seed in (1, 2, 3)]
    records += [record(tmp_path, "B", 1, [1, 1, 1, 0]), record(tmp_path, "B", 3, [0, 0, 0, 0])]
    records.append(record(tmp_path, "B", 2, status=FAILED, error="no\n  memory"))
    found = of(records, tmp_path)["B"]
    assert (found.seeds, found.done) == ((1, 2, 3), (1, 3))
    outcome = found.outcomes["held out"]
    assert outcome.score is not None and (outcome.score.mean, outcome.score.count) == (37.5, 2)
    assert outcome.difference is not None and (outcome.difference.mean, outcome.difference.seeds) == (-12.5, 2)
    (ended,) = summarise(records, tmp_path).ended
    assert (ended.method, ended.seed, ended.status, ended.error) == ("B", 2, FAILED, "no memory")


def test_a_method_of_which_every_seed_failed_stays_in_the_table(tmp_path: Path) -> None:
    records = [record(tmp_path, "A", 1, HALF)]
    records += [record(tmp_path, "B", seed, split=VALIDATION, status=DIVERGED) for seed in (1, 2)]
    found = of(records, tmp_path)["B"]
    assert (found.rate, found.done, found.costs) == (None, (), None)
    assert found.outcomes["held out"] == Outcome(None, 0)
    assert len(summarise(records, tmp_path).ended) == 2


def test_without_a_reference_nothing_differs(tmp_path: Path) -> None:
    records = [record(tmp_path, "A", 1, status=FAILED), record(tmp_path, "B", 1, HALF)]
    assert of(records, tmp_path)["B"].outcomes["held out"] == Outcome(Spread(50.0, None, 1), 4)


def test_a_score_that_is_no_mean_of_its_questions_is_marked(tmp_path: Path) -> None:
    records = [record(tmp_path, "A", 1, HALF), record(tmp_path, "B", 1, [1, 1, 1, 0])]
    assert not of(records, tmp_path)["B"].outcomes["held out"].by_points
    sums = {"held out": dataclasses.replace(records[1].scores["held out"], score=1510.0)}
    found = of([records[0], dataclasses.replace(records[1], scores=sums)], tmp_path)["B"].outcomes["held out"]
    assert found.by_points and found.score == Spread(1510.0, None, 1)
    assert found.difference is not None and found.difference.mean == 25.0


def test_scores_without_single_questions_are_paired_by_seed(tmp_path: Path) -> None:
    records = [
        dataclasses.replace(
            each, scores={"held out": dataclasses.replace(each.scores["held out"], per_question="", score=score)}
        )
        for each, score in ((record(tmp_path, "A", 1, HALF), 50.0), (record(tmp_path, "B", 1, HALF), 58.0))
    ]
    assert of(records, tmp_path)["B"].outcomes["held out"].difference == Difference(8.0, None, None, 1, 0)


def test_several_tests_and_tasks_stand_apart(tmp_path: Path) -> None:
    tests = {"easy": [1, 1], "hard": [0, 1]}
    records = [record(tmp_path, "A", 1, tests), record(tmp_path, "A", 1, [1, 0, 0, 0], task="shapes")]
    colours, shapes = summarise(records, tmp_path).tasks
    assert list(colours.tests) == [MEAN, "easy", "hard"] and list(shapes.tests) == ["held out"]
    means = {test: outcome.score.mean for test, outcome in colours.methods[0].outcomes.items() if outcome.score}
    assert means == {MEAN: 75, "easy": 100, "hard": 50}


def test_the_mean_of_tests_counts_each_of_them_alike_and_is_paired(tmp_path: Path) -> None:
    records = [
        record(tmp_path, "A", 1, {"short": [1], "long": [0, 0, 1, 1]}),
        record(tmp_path, "B", 1, {"short": [0], "long": [1, 1, 1, 1]}),
        record(tmp_path, "B", 2, {"short": [0], "long": [1, 1, 1, 0]}),
    ]
    found = of(records, tmp_path)
    assert found["A"].outcomes[MEAN] == Outcome(Spread(75.0, None, 1), 5)
    outcome = found["B"].outcomes[MEAN]
    assert outcome.score == Spread(43.75, pytest.approx(6.25 * 2**0.5), 2) and outcome.difference is not None
    assert (outcome.difference.mean, outcome.difference.seeds, outcome.difference.questions) == (-25.0, 1, 5)


def test_tests_whose_scores_are_no_means_of_questions_have_no_mean(tmp_path: Path) -> None:
    one = record(tmp_path, "A", 1, {"easy": [1], "sums": [1]})
    one.scores["sums"] = dataclasses.replace(one.scores["sums"], score=1500.0)
    assert list(of([one], tmp_path)["A"].outcomes) == ["easy", "sums"]


def test_the_learning_rates_that_were_tried_are_kept_with_what_diverged(tmp_path: Path) -> None:
    records = [
        record(tmp_path, "A", seed, [1, 0], split=VALIDATION, rate=rate, eval_loss=rate)
        for seed in (1, 2)
        for rate in (0.1, 0.01)
    ]
    records += [record(tmp_path, "A", seed, status=DIVERGED, split=VALIDATION, rate=1.0) for seed in (1, 2)]
    records += [record(tmp_path, "A", seed, [1, 1], rate=0.01) for seed in (1, 2)]
    (task,) = summarise(records, tmp_path).tasks
    assert [(one.rate, one.chosen, one.done, one.diverged) for one in task.tried] == [
        (0.01, True, 2, 0),
        (0.1, False, 2, 0),
        (1.0, False, 0, 2),
    ]
    assert task.tried[0].scores == {"held out": Spread(50.0, 0.0, 2)} and task.tried[2].scores == {"held out": None}
    assert task.tried[1].eval_loss == Spread(0.1, 0.0, 2)
    assert task.methods[0].outcomes["held out"].score == Spread(100.0, 0.0, 2)


def test_costs_are_means_over_seeds_and_what_was_not_measured_is_none(tmp_path: Path) -> None:
    measured = {"projector_parameters": 500, "file_bytes": 6000, "peak_bytes": 8}
    records = [
        record(tmp_path, "A", seed, HALF, step_seconds=seconds, step_ratio=2 * seconds, **measured)
        for seed, seconds in ((1, 0.1), (2, 0.3))
    ]
    costs = of(records, tmp_path)["A"].costs
    assert costs is not None and costs.step_seconds == pytest.approx(0.2) and costs.step_ratio == pytest.approx(0.4)
    assert (costs.trained_parameters, costs.with_projector, costs.file_bytes, costs.peak_bytes) == (1000, 1500, 6000, 8)
    assert costs.answer_seconds is None and costs.answer_ratio is None


def test_versions_and_commits_that_differ_are_all_named(tmp_path: Path) -> None:
    git = {"commit": "0123456789abcdef", "dirty": True}
    records = [
        record(tmp_path, "A", 1, HALF, versions={"torch": "2.1"}, started="2026-01-02", ended="2026-01-03", git=git),
        record(tmp_path, "A", 2, HALF, versions={"torch": "2.2"}, started="2026-01-01", ended="2026-01-02"),
    ]
    found = summarise(records, tmp_path)
    assert found.versions == {"torch": ("2.1", "2.2")} and found.commits == ("0123456789ab, with changes",)
    assert (found.began, found.ended_at, found.cells) == ("2026-01-01", "2026-01-03", 2)


def test_nothing_and_an_unknown_reference_are_told(tmp_path: Path) -> None:
    with pytest.raises(ArgumentsError, match="there are no results yet"):
        summarise([], tmp_path)
    with pytest.raises(ArgumentsError, match="there is no method 'MoReS1': did you mean 'MoReS'"):
        summarise([record(tmp_path, "MoReS", 1, HALF)], tmp_path, "MoReS1")
