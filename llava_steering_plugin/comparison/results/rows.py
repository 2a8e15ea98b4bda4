"""Write a summary as CSV: the rows of results.csv, one for each task, method, test and learning rate."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from llava_steering_plugin.comparison.records import TEST, VALIDATION
from llava_steering_plugin.comparison.results.statistics import Spread
from llava_steering_plugin.comparison.results.summary import Reached, Summary, TaskSummary, Tried

COLUMNS = (
    *("task", "split", "test", "benchmark", "method", "learning_rate", "chosen"),
    *("seeds", "done", "diverged", "failed", "mean", "deviation", "questions"),
    *("reference", "difference", "low", "high", "paired_seeds", "paired_questions", "difference_of"),
    *("trained_parameters", "projector_parameters", "file_bytes"),
    *("step_seconds", "step_ratio", "answer_seconds", "answer_ratio", "peak_bytes"),
)


def csv_text(summary: Summary) -> str:
    """Return results.csv. What is not known is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for task in summary.tasks:
        for one in task.methods:
            writer.writerows(_test_rows(summary, task, one))
        for tried in task.tried:
            writer.writerows(_validation_rows(task, tried))
    return text.getvalue()


def _test_rows(summary: Summary, task: TaskSummary, one: Reached) -> Iterator[dict[str, Any]]:
    """Yield a row for each test; the counts of cells that ended are of the seeds at this learning rate."""
    ended = [
        each.status
        for each in summary.ended
        if (each.task, each.method) == (task.task, one.method) and each.rate == (one.rate or 0.0)
    ]
    costs = {} if one.costs is None else vars(one.costs)
    for test, benchmark in task.tests.items():
        outcome = one.outcomes[test]
        row = {
            **_places(task.task, TEST, test, one.method, one.rate),
            "benchmark": benchmark,
            "chosen": one.rate is not None,
            "seeds": len(one.seeds),
            "done": len(one.done),
            "diverged": ended.count("diverged"),
            "failed": ended.count("failed"),
            "questions": outcome.questions,
            "reference": task.reference,
            **_spread(outcome.score),
            **costs,
        }
        if (found := outcome.difference) is not None:
            row |= {"difference": found.mean, "low": found.low, "high": found.high}
            row |= {"paired_seeds": found.seeds, "paired_questions": found.questions}
            row["difference_of"] = "right answers" if outcome.by_points else "score"
        yield row


def _validation_rows(task: TaskSummary, tried: Tried) -> Iterator[dict[str, Any]]:
    scores = {**tried.scores, **({} if tried.eval_loss is None else {"eval_loss": tried.eval_loss})}
    for test, score in scores.items():
        yield {
            **_places(task.task, VALIDATION, test, tried.method, tried.rate or None),
            "chosen": tried.chosen,
            "seeds": tried.seeds,
            "done": tried.done,
            "diverged": tried.diverged,
            "failed": tried.failed,
            **_spread(score),
        }


def _places(task: str, split: str, test: str, method: str, rate: float | None) -> dict[str, Any]:
    return {"task": task, "split": split, "test": test, "method": method, "learning_rate": rate}


def _spread(score: Spread | None) -> dict[str, Any]:
    return {} if score is None else {"mean": score.mean, "deviation": score.deviation}
