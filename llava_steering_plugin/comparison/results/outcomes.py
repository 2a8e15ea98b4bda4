"""Make the outcome of a method in each test, and in the mean of several tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from llava_steering_plugin.comparison.records import Record
from llava_steering_plugin.comparison.results.statistics import Points, paired, paired_by_seed, spread_of
from llava_steering_plugin.comparison.results.summary import Outcome

SAME = 0.01  # percent: a score that is the mean of its questions differs from it by rounding alone
MEAN = "mean of the tests"

OfQuestions = Mapping[tuple[str, str], Points]  # by cell and test
BySeed = Mapping[int, Record]


def outcomes_of(
    tests: Sequence[str] | Mapping[str, str],
    done: Sequence[Record],
    method: BySeed,
    reference: BySeed | None,
    points: OfQuestions,
) -> dict[str, Outcome]:
    """Return the outcome of a method in each test; `MEAN` is that of all the others.

    Args:
        done: the method's records.
        method, reference: records by seed, where the base stands at every seed; None: it is the reference itself.
        points: what each question is worth.
    """
    return {
        test: _mean([each for each in tests if each != MEAN], done, method, reference, points)
        if test == MEAN
        else _outcome(test, done, method, reference, points)
        for test in tests
    }


def has_mean(tests: Mapping[str, str], done: Sequence[Record], points: OfQuestions) -> bool:
    """Tell whether several tests have a mean: all have scores of single questions, and are the means of these."""
    return (
        len(tests) > 1
        and MEAN not in tests
        and all((each.cell, test) in points and not _is_other(test, each, points) for test in tests for each in done)
    )


def _is_other(test: str, record: Record, points: OfQuestions) -> bool:
    """Tell whether a score is something else than the mean of its questions."""
    worth = points.get((record.cell, test))
    return worth is not None and abs(record.scores[test].score - 100 * fmean(worth.values())) > SAME


def _outcome(
    test: str, done: Sequence[Record], method: BySeed, reference: BySeed | None, points: OfQuestions
) -> Outcome:
    scores = [record.scores[test] for record in done if test in record.scores]
    spread = spread_of([score.score for score in scores])
    questions = max((score.questions for score in scores), default=0)
    if reference is None:
        return Outcome(spread, questions)
    of_questions = tuple(_by_seed(test, each, points) for each in (method, reference))
    if all(of_questions):
        both = [*method.values(), *reference.values()]
        other = any(_is_other(test, record, points) for record in both if test in record.scores)
        return Outcome(spread, questions, paired((of_questions[0], of_questions[1])), by_points=other)
    by_seed = (
        {seed: record.scores[test].score for seed, record in each.items() if test in record.scores}
        for each in (method, reference)
    )
    return Outcome(spread, questions, paired_by_seed(*by_seed))


def _mean(
    tests: Sequence[str], done: Sequence[Record], method: BySeed, reference: BySeed | None, points: OfQuestions
) -> Outcome:
    spread = spread_of([fmean(record.scores[test].score for test in tests) for record in done])
    questions = max((sum(record.scores[test].questions for test in tests) for record in done), default=0)
    if reference is None:
        return Outcome(spread, questions)
    of_tests = [(_by_seed(test, method, points), _by_seed(test, reference, points)) for test in tests]
    return Outcome(spread, questions, paired(*of_tests))


def _by_seed(test: str, records: BySeed, points: OfQuestions) -> dict[int, Points]:
    return {seed: points[record.cell, test] for seed, record in records.items() if (record.cell, test) in points}
