"""MME's yes and no, and its pairs of questions: `evaluation/scores/mme.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_folders import make

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.evaluation.benchmark import GivenAnswer, Wanted
from llava_steering_plugin.evaluation.scores.mme import mme_metrics, read_mme, verdict


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        (" Yes, it is", "yes"),
        ("None", "no"),
        ("The answer is yes", "other"),
        ("not", "no"),
        ("", "other"),
    ],
)
def test_only_the_first_four_characters_count(text: str, said: str) -> None:
    assert verdict(text) == said


def test_the_prompt_tells_which_question_of_an_image_is_answered(tmp_path: Path) -> None:
    references = read_mme(make("mme", tmp_path / "official").annotations, Wanted())
    assert len(references.items) == 12
    call = "\nAnswer the question using a single word or phrase."
    keys = {
        references.key_of(GivenAnswer("OCR/1.png", "", prompt))
        for prompt in ("Is there a cat?", "Is there a cat?" + call, "Is there a cat?  Please answer yes or no." + call)
    }
    assert len(keys) == 1 and None not in keys
    for image, prompt in (("OCR/1.png", ""), ("OCR/9.png", "Is there a cat?"), ("../OCR/1.png", "Is there a cat?")):
        assert references.key_of(GivenAnswer(image, "", prompt)) is None


def test_an_image_with_one_question_left_out_has_no_acc_plus(tmp_path: Path) -> None:
    from llava_steering_plugin.evaluation.benchmark import Pair

    right = {"subtask": "OCR", "image": "OCR/1", "right": "yes"}
    found = mme_metrics([Pair("k", right, "yes")])
    assert found["OCR"] == {"score": 100.0, "accuracy": 100.0, "acc+": 0.0, "other": 0, "questions": 1}
    assert "cognition" not in found


@pytest.mark.parametrize("text", ["Is it? Please answer yes or no.\tYes\n", "Is it?\tYes\nIs he?\tPerhaps\n", "a\nb\n"])
def test_a_text_that_holds_no_two_questions_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "count").mkdir()
    (tmp_path / "count" / "7.txt").write_text(text)
    with pytest.raises(DataError, match=r"7\.txt is in another layout"):
        read_mme(tmp_path, Wanted())
