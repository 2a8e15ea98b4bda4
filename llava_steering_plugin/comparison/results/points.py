"""Read what single questions are worth, as `llava-steering score --per-question` writes it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from llava_steering_plugin.comparison.records import Record
from llava_steering_plugin.errors import ArgumentsError, Problems


def read_points(file: Path) -> dict[str, float]:
    """Return what each question is worth, by its id.

    Raises:
        ArgumentsError: the file cannot be read, or holds something else.
    """
    found: dict[str, float] = {}
    try:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            entry = json.loads(line)
            key, score = str(entry["question_id"]), float(entry["score"])
            if key in found:
                raise ValueError(f"question {key} stands there twice, again in line {number}")
            found[key] = score
        if not found:
            raise ValueError("it is empty")
    except OSError as error:
        raise ArgumentsError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ArgumentsError(f"{file} holds no scores of questions: {error or type(error).__name__}.") from error
    return found


def points_of(records: Iterable[Record], output: Path) -> dict[tuple[str, str], dict[str, float]]:
    """Return the points of all questions, by cell and test. What has no scores of single questions is left out.

    Args:
        output: the folder in which the records' files are.

    Raises:
        ArgumentsError: files cannot be read; all of them are named.
    """
    found = {}
    problems = Problems()
    for record in records:
        for test, score in record.scores.items():
            if score.per_question:
                with problems.noted():
                    found[record.cell, test] = read_points(output / score.per_question)
    problems.raise_any("these results cannot be compared by question")
    return found
