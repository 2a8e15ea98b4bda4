"""Read an answers file, LLaVA's answer.jsonl, and pair the answers with the questions of a benchmark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_steering_plugin.errors import DataError, listing, shortened
from llava_steering_plugin.evaluation.benchmark import GivenAnswer, Pair, References

SHOWN = 5  # ids that a message names of those that are missing, strange or doubled


@dataclass(frozen=True)
class Paired:
    """Answers beside their questions.

    Attributes:
        answered: the questions that have an answer, in the order of the annotations.
        missing: keys of those that have none.
        failed: how many of the answers are none: the model's logits became NaN or infinite.
    """

    answered: tuple[Pair, ...]
    missing: tuple[str, ...]
    failed: int


def read_answers(path: Path) -> list[GivenAnswer]:
    """Read an answers file, as `llava-steering eval` and LLaVA's own scripts write it.

    Raises:
        DataError: it cannot be read, or lines in it are no answers; the message lists them all.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"the answers in {path} cannot be read: {reason}.") from error
    answers, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            answers.append(_answer(json.loads(line), number))
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: {error or type(error).__name__}")
    if not answers and not problems:
        problems.append("it is empty")
    if problems:
        raise DataError(listing(f"{path} is no file of LLaVA's answers", shortened(problems)))
    return answers


def _answer(entry: Any, number: int) -> GivenAnswer:
    if not isinstance(entry, dict) or "question_id" not in entry or "text" not in entry:
        raise ValueError("it lacks question_id or text")
    identity, text = entry["question_id"], entry["text"]
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise ValueError(f"its question_id {identity!r} is neither text nor a whole number")
    if not isinstance(text, str):
        raise ValueError(f"its text {text!r} is no text")
    prompt, metadata = entry.get("prompt", ""), entry.get("metadata")
    failed = isinstance(metadata, dict) and bool(metadata.get("error"))
    return GivenAnswer(str(identity), text, prompt if isinstance(prompt, str) else "", number, failed)


def pair(answers: Sequence[GivenAnswer], references: References, *, allow_missing: bool) -> Paired:
    """Pair answers with questions.

    Args:
        allow_missing: questions without an answer are left out, and no problem.

    Raises:
        DataError: answers to no question, several to one, or questions without an answer; all in one message.
    """
    found: dict[str, GivenAnswer] = {}
    strangers, doubled = [], []
    for answer in answers:
        key = references.key_of(answer)
        if key is None:
            strangers.append(f"{answer.id} (line {answer.line})")
        elif key in found:
            doubled.append(f"{key} (lines {found[key].line} and {answer.line})")
        else:
            found[key] = answer
    missing = tuple(key for key in references.items if key not in found)
    problems = []
    if strangers:
        why = "" if found else ": the annotations are of another split or benchmark"
        problems.append(f"{len(strangers):,} of {len(answers):,} answers are to no question{why}: {_some(strangers)}")
    if doubled:
        problems.append(f"{len(doubled):,} answers are to a question that has one already: {_some(doubled)}")
    if missing and found and not allow_missing:
        problems.append(
            f"{len(missing):,} of {len(references.items):,} questions have no answer: {_some(missing)}. Answer them, "
            "or give --allow-missing to score the others alone"
        )
    if problems:
        raise DataError(listing("the answers do not fit the annotations", problems))
    pairs = [Pair(key, reference, found[key].text) for key, reference in references.items.items() if key in found]
    return Paired(tuple(pairs), missing, sum(answer.failed for answer in found.values()))


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")
