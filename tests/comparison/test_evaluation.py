"""An evaluation answers and scores what is not there yet, and says what keeps it from a score."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from compared import content
from tiny_llava import TinyLlava

from llava_steering_plugin.comparison.cells import Cell, Plan, plan_cells
from llava_steering_plugin.comparison.evaluation import evaluate, files_of, find_record, score_in
from llava_steering_plugin.comparison.processes import Command
from llava_steering_plugin.comparison.provenance import provenance
from llava_steering_plugin.comparison.reading import comparison_from
from llava_steering_plugin.comparison.records import DIVERGED, DONE, FAILED, VALIDATION, Record, Score
from llava_steering_plugin.errors import DataError

SCORES = {
    "task": "exact_match",
    "answers": 8,
    "metrics": {"all": {"accuracy": 62.5, "questions": 8}, "red": {"accuracy": None}},
    "per_question": {"metric": "accuracy", "mean": 62.5, "questions": 8},
}
TIMES = {"seconds": 0.2, "base_seconds": 0.1, "ratio": 2.0}


@pytest.fixture
def plan(tiny: TinyLlava, tmp_path: Path) -> Plan:
    return plan_cells(comparison_from(content(tiny, tmp_path), tmp_path))


def begun(plan: Plan) -> tuple[Cell, Generator[Command, int, Record]]:
    """The base, which needs no training, and what it runs."""
    base = plan.cells[0]
    return base, evaluate(base, plan, VALIDATION, plan.comparison.output, provenance(), {})


def last(steps: Generator[Command, int, Record], status: int) -> Record:
    with pytest.raises(StopIteration) as stopped:
        steps.send(status)
    found: Record = stopped.value.value
    return found


def answered(plan: Plan, cell: Cell, **metadata: Any) -> Any:
    files = files_of(cell, plan, VALIDATION, cell.task.validation[0], plan.comparison.output)
    files.answers.write_text(json.dumps({"question_id": 1, "text": "", "metadata": metadata}) + "\n")
    files.timing.write_text(json.dumps(TIMES))
    return files


def test_answers_are_made_then_scored_and_then_found_again(plan: Plan) -> None:
    cell, steps = begun(plan)
    assert "eval" in next(steps).words
    files = answered(plan, cell)
    command = steps.send(0)
    assert "score" in command.words and str(files.per_question) in command.words
    files.scores.write_text(json.dumps(SCORES))
    files.per_question.write_text("")
    record = last(steps, 0)
    output = plan.comparison.output
    paths = [str(file.relative_to(output)) for file in (files.answers, files.per_question)]
    assert record.status == DONE and record.scores == {"seen": Score("exact_match", 62.5, 8, *paths)}
    assert (record.answer_seconds, record.answer_ratio) == (0.2, 2.0)
    assert find_record(cell, plan, VALIDATION, output) == record


def test_answers_of_a_run_that_was_killed_are_scored_and_not_made_again(plan: Plan) -> None:
    cell, steps = begun(plan)
    next(steps)
    answered(plan, cell)
    steps.close()
    _, again = begun(plan)
    assert "score" in next(again).words


@pytest.mark.parametrize(
    ("status", "metadata", "expected", "said"),
    [
        (1, {"error": "NaN"}, DIVERGED, "1 answers of seen are none"),
        (-9, {}, FAILED, "`eval` of seen ended with signal SIGKILL"),
    ],
)
def test_answers_that_cannot_be_had_say_why(
    plan: Plan, status: int, metadata: dict[str, Any], expected: str, said: str
) -> None:
    cell, steps = begun(plan)
    next(steps)
    answered(plan, cell, **metadata)
    record = last(steps, status)
    assert record.status == expected and said in (record.error or "")
    found = find_record(cell, plan, VALIDATION, plan.comparison.output)
    assert found == (record if expected == DIVERGED else None), "what failed is tried again"


def test_a_number_that_a_benchmark_does_not_give_is_named_with_those_that_it_does(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(SCORES))
    assert score_in(file, None) == score_in(file, "all.accuracy") == score_in(file, "accuracy") == (62.5, 8)
    for metric in ("red.accuracy", "all.bleu", "nothing"):
        with pytest.raises(DataError, match=r"`metric` takes one of: all\.accuracy, all\.questions, red\.accuracy"):
            score_in(file, metric)
