"""One question of a benchmark, as LLaVA's training data and as LLaVA's question file have it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What LLaVA-1.5 adds to questions, in its training data and its evaluation alike.
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
IMAGE = "<image>"
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Entry:
    """One question.

    Attributes:
        id: as `llava-steering score` expects it.
        question: what is asked, with the call for a short answer.
        answer: what a training learns; None: the split has no answers.
        image: path below the benchmark's folder; None: the question is about no image.
        task: the task of a sample, where it is not the benchmark's.
        category: what LLaVA's question file calls so, such as POPE's split.
        draw: writes the image to a path, where the official files hold none.
    """

    id: str | int
    question: str
    answer: str | None
    image: str | None
    task: str | None = None
    category: str | None = None
    draw: Callable[[Path], None] | None = None

    def sample(self, task: str) -> dict[str, Any]:
        """Return the question as a sample of LLaVA's training data; `answer` must be known."""
        picture = {} if self.image is None else {"image": f"{task}/{self.image}"}
        said = self.question if self.image is None else f"{IMAGE}\n{self.question}"
        turns = [{"from": "human", "value": said}, {"from": "gpt", "value": self.answer}]
        return {"id": f"{task}-{self.id}", **picture, "task": self.task or task, "conversations": turns}

    def line(self, task: str) -> dict[str, Any]:
        """Return the question as a line of LLaVA's question file."""
        picture = {} if self.image is None else {"image": f"{task}/{self.image}"}
        return {"question_id": self.id, **picture, "text": self.question, "category": self.category or task}


def asked(question: str, *calls: str) -> str:
    """Return a question with calls for a kind of answer, a line each."""
    return "\n".join((unmarked(question).strip(), *calls))


def unmarked(text: str) -> str:
    """Return a text without LLaVA's mark for an image, which would ask for a picture."""
    return text.replace(IMAGE, "(image)")


def options(choices: Sequence[str]) -> str:
    """Return choices, a line each, after their letters."""
    if len(choices) > len(LETTERS):
        raise ValueError(f"a question has {len(choices)} choices")
    return "\n".join(f"{letter}. {unmarked(str(choice))}" for letter, choice in zip(LETTERS, choices, strict=False))


def most_common(answers: Iterable[str]) -> str:
    """Return the answer that most annotators gave; of several, the one that comes first."""
    counted = Counter(answers)
    if not counted:
        raise ValueError("a question has no answers")
    return counted.most_common(1)[0][0]


def file_name(value: Any) -> str:
    """Return a name of a file from an annotation.

    Raises:
        ValueError: it is a path, or no name at all: it could lead out of the benchmark's folder.
    """
    name = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not name or name in (".", "..") or not name.isprintable() or set(name) & set("/\\:"):
        raise ValueError(f"{value!r} is no name of a file")
    return name
