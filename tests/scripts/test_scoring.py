"""Questions are written with their answers, and scored by kind (`experiments.scoring`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_steering_plugin.errors import DataError


def test_questions_are_written_as_llava_reads_them_and_scored_by_kind(tmp_path: Path) -> None:
    from experiments.scoring import Asked, accuracy, kinds_in, write_questions

    asked = [
        Asked("test/3.png", "what color is it?", "red", "colour"),
        Asked("test/4.png", "what color is it?", "blue", "colour"),
        Asked("test/4.png", "a circle?", "yes", "yes/no"),
    ]
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    write_questions(questions, asked)
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    first = {"question_id": 0, "image": "test/3.png", "text": "what color is it?", "answer": "red", "task": "colour"}
    assert lines[0] == first
    assert kinds_in(questions) == ["colour", "colour", "yes/no"]
    given = [json.dumps({"question_id": n, "text": text}) for n, text in enumerate(("Red", "red", "yes"))]
    answers.write_text("\n".join(given))
    assert accuracy(answers, questions) == pytest.approx({"all": 2 / 3, "colour": 0.5, "yes/no": 1.0})
    answers.write_text("\n".join(given[:2]))
    with pytest.raises(DataError, match="1 of 3 questions have no answer"):
        accuracy(answers, questions)
