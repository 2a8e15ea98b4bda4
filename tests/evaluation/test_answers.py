"""An answers file is read whole or refused; answers meet their questions: `evaluation/answers.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.evaluation.answers import pair, read_answers
from llava_steering_plugin.evaluation.benchmark import GivenAnswer, References


def test_numbers_and_texts_are_the_same_id_and_empty_lines_are_none(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"question_id": 7, "text": "x\\u2028y", "prompt": "p"}\n\n{"question_id": "8", "text": ""}\n')
    first, second = read_answers(file)
    assert (first.id, first.text, first.prompt, first.line) == ("7", "x\u2028y", "p", 1)
    assert (second.id, second.line, second.failed) == ("8", 3, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("[1]\n", "line 1: it lacks question_id or text"),
        ('{"question_id": [1], "text": "a"}\n', r"line 1: its question_id \[1\] is neither text nor a whole number"),
        ('{"question_id": true, "text": "a"}\n', "its question_id True is neither"),
        ('{"question_id": 1, "text": null}\n', "line 1: its text None is no text"),
        ('{"question_id": 1, "text": "a"', "line 1: "),
        ("[" * 100_000, "line 1: "),
        ("\n".join(["x"] * 50), "and 30 more like these"),
    ],
)
def test_what_is_no_answer_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read_answers(tmp_path / "a.jsonl")


def test_a_missing_file_and_one_that_is_no_text_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "a.jsonl", tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_answers(path)


def test_only_some_of_many_ids_are_named() -> None:
    answers = [GivenAnswer(str(number), "a", line=number) for number in range(40)]
    references = References({str(number): None for number in range(39, 80)})
    with pytest.raises(DataError) as caught:
        pair(answers, references, allow_missing=False)
    text = str(caught.value)
    assert "39 of 40 answers are to no question: 0 (line 0), 1 (line 1)" in text and "and 34 more" in text
    assert "40 of 41 questions have no answer: 40, 41, 42, 43, 44 and 35 more" in text


def test_pairs_come_in_the_order_of_the_annotations() -> None:
    answers = [GivenAnswer("2", "two"), GivenAnswer("1", "one", failed=True)]
    paired = pair(answers, References({"1": "a", "2": "b", "3": "c"}), allow_missing=True)
    assert [(each.key, each.reference, each.text) for each in paired.answered] == [("1", "a", "one"), ("2", "b", "two")]
    assert (paired.missing, paired.failed) == (("3",), 1)
