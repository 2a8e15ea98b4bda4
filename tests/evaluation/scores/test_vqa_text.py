"""Answers are normalised as LLaVA's own copy of the official code does: `evaluation/scores/vqa_text.py`."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest

from llava_steering_plugin.evaluation.scores.vqa_text import CONTRACTIONS, NUMBERS, textvqa_answer, vqa_answer

WORDS = (
    *(
        "yes",
        "No",
        "a",
        "the",
        "An",
        "two",
        "TEN",
        "none",
        "dont",
        "it's",
        "1,000",
        "3.5",
        "red,",
        "blue?",
        "x/y",
        "\t",
    ),
    *("left-right", "U.S.", "(cat)", "somebody'd", "youdve", "couldnt've", "What's", " cat's", "\n", "\t", "!", "."),
)


@pytest.fixture(scope="module")
def theirs(pristine_llava: Path) -> Any:
    """LLaVA's `EvalAIAnswerProcessor`; its file needs nothing else of LLaVA."""
    spec = importlib.util.spec_from_file_location("their_evaluator", pristine_llava / "llava/eval/m4c_evaluator.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EvalAIAnswerProcessor()


def test_it_normalises_as_llava_does_whatever_the_answer(theirs: Any) -> None:
    draw = random.Random(0)
    for _ in range(2000):
        text = " ".join(draw.choices(WORDS, k=draw.randint(0, 4)))
        assert textvqa_answer(text) == theirs(text), text


def test_its_tables_are_those_of_the_official_code(theirs: Any) -> None:
    official = {wrong: right for wrong, right in theirs.CONTRACTIONS.items() if wrong != right}
    # Words are in lower case when they are looked up: the entries of I'm and I've find nothing.
    assert CONTRACTIONS == {wrong: right for wrong, right in official.items() if wrong == wrong.lower()}
    assert NUMBERS.items() <= theirs.NUMBER_MAP.items() and len(NUMBERS) == 12


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Two dogs.", "2 dogs"),
        ("left/right", "left right"),
        ("left / right", "left  right".replace("  ", " ")),
        ("1,000-ish", "1000ish"),
        ("3.5", "3.5"),
        ("dont\tKNOW\n", "don't know"),
        ("an", ""),
    ],
)
def test_what_the_rules_do(text: str, normal: str) -> None:
    assert vqa_answer(text) == normal
