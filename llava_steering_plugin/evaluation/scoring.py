"""Score a file of answers: check everything first, then apply the benchmark's rule, and write whole files or none."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_steering_plugin.errors import ArgumentsError, DataError, Problems
from llava_steering_plugin.evaluation.answers import Paired, pair, read_answers
from llava_steering_plugin.evaluation.benchmark import (
    Benchmark,
    GivenAnswer,
    Metrics,
    Pair,
    Points,
    References,
    Wanted,
    percent,
)
from llava_steering_plugin.evaluation.registry import benchmark_of
from llava_steering_plugin.whole_files import write_whole


@dataclass(frozen=True)
class Scores:
    """Hold what the answers to a benchmark come to.

    Attributes:
        metrics: numbers by name, for all questions and for groups; empty where a judge or a test server scores.
        missing: how many questions have no answer, and are left out.
        failed: how many answers are none: the model's logits became NaN or infinite.
        submission: what the test server or the judge takes; None: it was not asked for.
        notes: what a reader of the numbers must know.
        points: what each question is worth by itself, by its key; None: it was not asked for.
        mean_of_points: the name of the metric that is 100 times their mean.
    """

    task: str
    metrics: Metrics
    answers: int
    missing: int
    failed: int
    submission: Any = None
    notes: tuple[str, ...] = ()
    points: Points | None = None
    mean_of_points: str = "accuracy"

    def as_json(self) -> dict[str, Any]:
        """Return everything but the submission and the points as plain values; of these, their mean in percent."""
        counts = {"answers": self.answers, "missing": self.missing, "failed": self.failed}
        found = {"task": self.task, **counts, "metrics": self.metrics, "notes": list(self.notes)}
        if self.points is None:
            return found
        mean = percent(list(self.points.values()))
        return {**found, "per_question": {"metric": self.mean_of_points, "mean": mean, "questions": len(self.points)}}


def score(
    task: str,
    answers: Path,
    annotations: Path,
    *,
    split: str | None = None,
    questions: Path | None = None,
    allow_missing: bool = False,
    submission: bool = False,
    per_question: bool = False,
) -> Scores:
    """Score the answers to a benchmark by its official rule.

    Args:
        task: one of `BENCHMARKS`.
        answers: LLaVA's answer.jsonl.
        annotations: the official file or folder.
        split: a part that the official files name.
        questions: LLaVA's question file, for POPE.
        allow_missing: questions without an answer are left out; otherwise they are refused.
        submission: make the file for the test server or the judge.
        per_question: also return what each question is worth by itself.

    Raises:
        ArgumentsError: the task is unknown, or lacks what is asked for.
        DataError: a file is missing or damaged, or the answers do not fit the annotations. Several problems are one
            error.
    """
    benchmark = benchmark_of(task)
    problems = Problems()
    with problems.noted():
        _check_options(task, benchmark, {"split": split, "questions": questions}, submission, per_question)
    given: list[GivenAnswer] = []
    with problems.noted():
        given = read_answers(answers)
    references: References | None = None
    with problems.noted():
        references = benchmark.read(annotations, Wanted(split, questions))
        if references.secret and not submission:
            raise ArgumentsError(
                f"{annotations} holds no answers: it is a test split. Give --submission FILE to make what its test "
                "server takes, or the annotations of another split."
            )
        if references.secret and per_question:
            raise ArgumentsError(
                f"{annotations} holds no answers, so no question has a score: leave out --per-question."
            )
    problems.raise_any(f"{task} cannot be scored")
    assert references is not None
    try:
        paired = pair(given, references, allow_missing=allow_missing)
    except DataError as error:
        raise DataError(f"{error}\n(annotations: {annotations}){_hint(benchmark)}") from None
    scored = benchmark.metrics is not None and not references.secret
    return Scores(
        task,
        benchmark.metrics(paired.answered) if scored and benchmark.metrics is not None else {},
        len(given),
        len(paired.missing),
        paired.failed,
        benchmark.submission(_all(paired, references)) if submission and benchmark.submission is not None else None,
        _notes(benchmark, references, paired),
        benchmark.points(paired.answered) if per_question and benchmark.points is not None else None,
        benchmark.mean_of_points,
    )


def _check_options(
    task: str, benchmark: Benchmark, options: Mapping[str, Any], submission: bool, per_question: bool
) -> None:
    for name, value in options.items():
        if value is not None and name not in benchmark.options:
            raise ArgumentsError(f"{task} takes no --{name}.")
    if submission and benchmark.submission is None:
        raise ArgumentsError(f"{task} has no file for a test server or a judge; leave out --submission.")
    if per_question and benchmark.points is None:
        raise ArgumentsError(f"{task} has no rule that scores single questions here; leave out --per-question.")
    if not submission and benchmark.metrics is None:
        raise ArgumentsError(f"{task} is scored by a judge model: --submission FILE makes the file that it takes.")


def _hint(benchmark: Benchmark) -> str:
    if benchmark.shared_ids:
        return "\nSeveral questions have the same id: the answers need `prompt`, as LLaVA writes it."
    if "questions" in benchmark.options:
        return "\nAnswers to LLaVA's own question file need --questions: its ids are others."
    return ""


def _all(paired: Paired, references: References) -> list[Pair]:
    """Return all questions of the split, with empty text where there is no answer."""
    texts = {each.key: each.text for each in paired.answered}
    return [Pair(key, reference, texts.get(key, "")) for key, reference in references.items.items()]


def _notes(benchmark: Benchmark, references: References, paired: Paired) -> tuple[str, ...]:
    notes = []
    if paired.missing:
        notes.append(f"{len(paired.missing):,} of {len(references.items):,} questions have no answer and are left out")
    if paired.failed:
        notes.append(f"{paired.failed:,} answers are empty because the model's logits became NaN or infinite")
    if references.secret:
        notes.append("a test split: its test server scores the submission")
    if benchmark.metrics is None:
        notes.append("a judge model scores the submission")
    if benchmark.remarks is not None:
        notes += benchmark.remarks()
    return tuple(notes)


def check_writable(path: Path) -> None:
    """Create the folder of a file that will be written, and check that it can be.

    Raises:
        ArgumentsError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise ArgumentsError(f"{path} is a folder, and should be a file.")
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ArgumentsError(f"{path} cannot be written: {error.strerror or error}. Choose another.") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader finds the old file or the whole new one.

    Raises:
        ArgumentsError: it cannot be written.
    """
    _write(path, json.dumps(value, indent=1) + "\n")


def write_points(path: Path, points: Points) -> None:
    """Write what each question is worth, one JSON object a line: `question_id`, which is its key, and `score`.

    Raises:
        ArgumentsError: it cannot be written.
    """
    lines = (json.dumps({"question_id": key, "score": point}) + "\n" for key, point in points.items())
    _write(path, "".join(lines))


def _write(path: Path, text: str) -> None:
    check_writable(path)
    try:
        if path.exists() and not path.is_file():  # a pipe, or /dev/stdout
            path.write_text(text, encoding="utf-8")
        else:
            write_whole(path, text)
    except OSError as error:
        raise ArgumentsError(f"{path} cannot be written: {error.strerror or error}. Choose another.") from error
