"""Write questions with their answers for evaluation, and score what a model answers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from llava_steering_plugin.evaluation.scoring import score


class Asked(NamedTuple):
    """A question: its picture (a path below the picture folder), the text, the answer and the kind."""

    image: str
    text: str
    answer: str
    kind: str


def write_questions(file: Path, questions: Iterable[Asked]) -> None:
    """Write a question file of LLaVA's whose lines have their answers, as `score exact_match` takes it."""
    with file.open("w") as lines:
        for place, one in enumerate(questions):
            line = {"question_id": place, "image": one.image, "text": one.text, "answer": one.answer, "task": one.kind}
            lines.write(json.dumps(line) + "\n")


def kinds_in(questions: Path) -> list[str]:
    """Return the kind of each question of a file."""
    return [json.loads(line)["task"] for line in questions.read_text().split("\n") if line]


def accuracy(answers: Path, questions: Path) -> dict[str, float]:
    """Return the share of right answers over all and by kind.

    Raises:
        DataError: the two files are not of the same questions.
    """
    metrics = score("exact_match", answers, questions).metrics
    return {kind: float(values["accuracy"] or 0) / 100 for kind, values in metrics.items()}
