"""Write test questions for upstream's evaluation, score the answers, and count an adapter's parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple


class Asked(NamedTuple):
    """A test question: its picture (a path below the picture folder), the text, the answer and the kind."""

    image: str
    text: str
    answer: str
    kind: str


def write_questions(folder: Path, questions: Iterable[Asked]) -> None:
    """Write questions.jsonl for upstream's evaluation, and answers.json in the same order, into `folder`."""
    asked = list(questions)
    with (folder / "questions.jsonl").open("w") as lines:
        for place, question in enumerate(asked):
            line = {"question_id": place, "image": question.image, "text": question.text}
            lines.write(json.dumps(line) + "\n")
    answers = [{"answer": question.answer, "kind": question.kind} for question in asked]
    (folder / "answers.json").write_text(json.dumps(answers))


def accuracy(answers: Path, expected: Path, kinds: Sequence[str]) -> dict[str, float]:
    """Return the share of exactly right answers over all and by kind, from upstream's answers file.

    Raises:
        ValueError: the two files are not of the same questions.
    """
    wanted = json.loads(expected.read_text())
    given = {
        line["question_id"]: line["text"] for line in map(json.loads, filter(None, answers.read_text().split("\n")))
    }
    if sorted(given) != list(range(len(wanted))):
        raise ValueError(f"{answers} has {len(given)} answers and {expected} {len(wanted)} questions")
    right = [given[place].strip().lower() == entry["answer"] for place, entry in enumerate(wanted)]
    shares = {"all": sum(right) / len(right)}
    for kind in kinds:
        of_kind = [hit for hit, entry in zip(right, wanted, strict=True) if entry["kind"] == kind]
        shares[kind] = sum(of_kind) / len(of_kind)
    return shares


def parameters(adapter: Path, without: str | None = None) -> int:
    """Return the number of parameters in an adapter's file, ours or PEFT's.

    Args:
        without: parameters with this text in their names are left out.
    """
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        names = [name for name in file.keys() if not name.startswith("fingerprint.")]
        return sum(
            math.prod(file.get_slice(name).get_shape()) for name in names if without is None or without not in name
        )
