"""MMMU's rules for choices and open answers, worked out by hand: `evaluation/scores/mmmu.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.evaluation.benchmark import Pair, Wanted
from llava_steering_plugin.evaluation.scores.mmmu import (
    DISCIPLINES,
    SUBJECTS,
    choice_of,
    is_right,
    mmmu_metrics,
    open_answers,
    read_mmmu,
)

CHOICES = {"A": "75 V", "B": "a red fox", "C": "none"}


def drawn(letters: Sequence[str]) -> str:
    return "drawn"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(A) or (B)", "B"),
        ("(B), and A is wrong", "B"),  # brackets count before bare letters
        ("A or B , not sure", "B"),
        ("I would say that it is a Red Fox there", "B"),
        ("a red fox", "drawn"),  # five words or fewer are not searched for a choice's text
        ("b", "drawn"),
        ("", "drawn"),
    ],
)
def test_the_letter_that_stands_last_is_chosen(text: str, letter: str) -> None:
    assert choice_of(text, CHOICES, drawn) == letter


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("36 watts", {"36 watts", 36.0}),
        ("The answer is 1,234.567.", {1234.57, 1234.0, 234.57}),
        ("So x = 5", {5.0}),
        ("It is red.\nTherefore blue", {"red.", "blue"}),
        ("C", {" c", "c "}),
    ],
)
def test_an_open_answer_says_its_telling_ends_and_their_numbers(text: str, found: set[object]) -> None:
    assert found <= open_answers(text)


@pytest.mark.parametrize(
    ("text", "right", "verdict"),
    [
        ("The result is 3.429", ["24/7", "3.429"], True),
        ("30 A", "30", True),
        ("The town is Tampa, Florida", ["Tampa", "Florida"], True),
        ("1.061", "1.06", True),
        ("1.07", "1.06", False),
        ("cat", "C", False),  # one letter is no match inside a word
        ("it is option c here", "C", True),
    ],
)
def test_an_open_answer_is_right_if_it_holds_a_right_text_or_is_a_right_number(
    text: str, right: str | list[str], verdict: bool
) -> None:
    assert is_right(text, right) is verdict


def test_every_subject_is_of_one_discipline() -> None:
    named = [subject for names in DISCIPLINES.values() for subject in names.split()]
    assert len(SUBJECTS) == 30 and sorted(named) == sorted(SUBJECTS)


def test_the_file_of_answers_has_no_choices_so_a_choice_is_a_letter_alone(tmp_path: Path) -> None:
    entries = {
        "validation_Art_Theory_2": {"question_type": "short-answer", "ground_truth": ["Rome", "Roma"]},
        "validation_Accounting_1": {"question_type": "multiple-choice", "ground_truth": "B"},
    }
    file = tmp_path / "answer_dict_val.json"
    file.write_text(json.dumps(entries))
    references = read_mmmu(file, Wanted())
    assert list(references.items) == ["validation_Accounting_1", "validation_Art_Theory_2"]
    texts = ("(B)", "It is in Roma")
    pairs = [Pair(*item, text) for item, text in zip(references.items.items(), texts, strict=True)]
    found = mmmu_metrics(pairs)
    assert found["Accounting"]["accuracy"] == 0 and found["Art_Theory"]["accuracy"] == 100
    file.write_text(json.dumps({"validation_Alchemy_1": entries["validation_Accounting_1"]}))
    with pytest.raises(DataError, match="subject 'Alchemy' is unknown"):
        read_mmmu(file, Wanted())


def test_what_is_drawn_is_the_same_in_every_run() -> None:
    reference = {"kind": "multiple-choice", "choices": CHOICES, "right": "A", "subject": "Art"}
    pairs = [Pair(str(number), reference, "?") for number in range(300)]
    first = mmmu_metrics(pairs)["all"]["accuracy"]
    assert first == mmmu_metrics(pairs)["all"]["accuracy"] and 20 < float(first or 0) < 47
