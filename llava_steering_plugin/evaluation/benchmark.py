"""Describe a benchmark: how its official files are read, by which rule it scores, and what its test server takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What a benchmark comes to: numbers by name, for all questions (`ALL`) and for groups of them. None: undefined.
Metrics = dict[str, dict[str, float | int | None]]
ALL = "all"
# What the answer to each question is worth by itself, by key: between 0 and 1, and for CIDEr from 0 on.
Points = dict[str, float]


@dataclass(frozen=True)
class GivenAnswer:
    """One line of an answers file.

    Attributes:
        id: its `question_id`, as text.
        prompt: the question as it was asked.
        line: its number in the file, from 1.
        failed: the model gave no answer; `llava-steering eval` says so in `metadata`.
    """

    id: str
    text: str
    prompt: str = ""
    line: int = 0
    failed: bool = False


@dataclass(frozen=True)
class Pair:
    """The answer to a question, and what the annotations say of the question."""

    key: str
    reference: Any
    text: str


@dataclass(frozen=True)
class Wanted:
    """Say which part of a benchmark is scored, beside its annotations.

    Attributes:
        split: a part that the official files name; None: the benchmark's own default.
        questions: LLaVA's question file, where answers can only be told apart with it.
    """

    split: str | None = None
    questions: Path | None = None


@dataclass(frozen=True)
class References:
    """The questions of a split, each with its reference.

    Attributes:
        items: what a rule needs of each question, by key.
        secret: the annotations hold no answers: those of a test split.
        find: returns the key of the question that an answer is to, or None. Default: its id.
    """

    items: Mapping[str, Any]
    secret: bool = False
    find: Callable[[GivenAnswer], str | None] | None = None

    def key_of(self, answer: GivenAnswer) -> str | None:
        """Return the key of the question that an answer is to; None: there is none."""
        if self.find is not None:
            return self.find(answer)
        return answer.id if answer.id in self.items else None


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        annotations: the official file or folder that `--annotations` names, in words.
        read: reads it. Raises DataError.
        metrics: the official rule; None: a judge model decides.
        submission: makes what the test server or the judge takes, of all questions; a missing answer is empty text.
        shared_ids: several questions may have the same id: those about one image.
        options: the options of `score` that `read` looks at: "split", "questions".
        remarks: returns what this installation leaves out of the numbers.
        points: what the rule gives each question by itself; None: it gives nothing. 100 times their mean is the metric
            `mean_of_points` of all questions, and of each group.
        mean_of_points: the name of that metric.
    """

    annotations: str
    read: Callable[[Path, Wanted], References]
    metrics: Callable[[Sequence[Pair]], Metrics] | None
    submission: Callable[[Sequence[Pair]], Any] | None = None
    shared_ids: bool = False
    options: frozenset[str] = field(default_factory=frozenset)
    remarks: Callable[[], Sequence[str]] | None = None
    points: Callable[[Sequence[Pair]], Points] | None = None
    mean_of_points: str = "accuracy"


def percent(points: Sequence[float]) -> float | None:
    """Return the mean of points between 0 and 1, in percent; None: there are none."""
    return 100 * sum(points) / len(points) if points else None


def accuracies(points: Mapping[str, float], groups: Mapping[str, str] | None = None) -> Metrics:
    """Return the accuracy of all questions, and of groups.

    Args:
        points: of each question, between 0 and 1.
        groups: the group of each question; questions that it lacks are in none.
    """
    found: Metrics = {ALL: {"accuracy": percent(list(points.values())), "questions": len(points)}}
    members: dict[str, list[float]] = {}
    for key, group in sorted((groups or {}).items(), key=lambda each: each[1]):
        members.setdefault(group, []).append(points[key])
    for group, each in members.items():
        found[group] = {"accuracy": percent(each), "questions": len(each)}
    return found
