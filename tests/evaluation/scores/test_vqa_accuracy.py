"""VQA accuracy over ten annotators, its variants, and which question an answer is to: `scores/vqa_accuracy.py`.

Covers `evaluation/scores/vqa_accuracy.py`; the official layouts are in tests/evaluation/test_scoring.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_folders import make

from llava_steering_plugin.evaluation.benchmark import GivenAnswer, Wanted
from llava_steering_plugin.evaluation.scores.vqa_accuracy import (
    leave_one_out,
    read_textvqa,
    textvqa_point,
    vizwiz_point,
    vqa_point,
)


@pytest.mark.parametrize(("same", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_an_answer_is_as_right_as_the_known_steps_of_the_benchmark(same: int, accuracy: float) -> None:
    assert leave_one_out("cat", ["cat"] * same + ["dog"] * (10 - same)) == pytest.approx(accuracy)


def test_where_all_annotators_agree_vqa_compares_their_text_as_it_is() -> None:
    assert vqa_point("the cat", ["cat"] * 10) == 1  # LLaVA has normalised the answer before
    assert vqa_point("the cat", ["the cat"] * 10) == 0  # and the server takes that text as it is
    assert vqa_point("the cat", ["the cat"] * 9 + ["dog"]) == 1


def test_vizwiz_takes_the_annotators_words_as_they_are_and_textvqa_does_not() -> None:
    humans = ["The Cat"] * 5 + ["dog"] * 5
    assert vizwiz_point("the cat", humans) == 0
    assert textvqa_point("the cat", humans) == 1


@pytest.mark.parametrize(
    ("key", "prompt", "found"),
    [
        ("aa", "What time is it?", "6"),
        ("aa", "WHAT BRAND?\nReference OCR token: x\nAnswer shortly.", "5"),
        ("aa", "Reference OCR token: x\nWhat brand?\nAnswer shortly.", "5"),
        ("aa", "OCR tokens: x. Question: What brand? Short answer:", "5"),
        ("6", "", "6"),
        ("aa", "", None),
        ("bb", "What brand?", None),
    ],
)
def test_textvqas_question_is_found_in_every_prompt_that_llava_has_had(
    key: str, prompt: str, found: str | None, tmp_path: Path
) -> None:
    references = read_textvqa(make("textvqa", tmp_path / "official").annotations, Wanted())
    assert references.key_of(GivenAnswer(key, "text", prompt)) == found
