"""A question as LLaVA's two kinds of files have it: `evaluation/layouts/entry.py`."""

from __future__ import annotations

import pytest

from llava_steering_plugin.evaluation.layouts.entry import SHORT, Entry, asked, most_common, options


def test_a_question_about_an_image_has_llavas_mark_in_training_and_not_in_the_question_file() -> None:
    entry = Entry(7, asked("What is <image>? ", SHORT), "red", "val/7.jpg", category="popular")
    assert entry.sample("pope") == {
        "id": "pope-7",
        "image": "pope/val/7.jpg",
        "task": "pope",
        "conversations": [
            {"from": "human", "value": f"<image>\nWhat is (image)?\n{SHORT}"},
            {"from": "gpt", "value": "red"},
        ],
    }
    assert entry.line("pope") == {
        "question_id": 7,
        "image": "pope/val/7.jpg",
        "text": f"What is (image)?\n{SHORT}",
        "category": "popular",
    }
    assert "image" not in Entry(1, "Why?", "x", None).sample("mmlu") | Entry(1, "Why?", "x", None).line("mmlu")


def test_the_first_of_equally_common_answers_is_learned() -> None:
    assert most_common(["b", "a", "a", "b"]) == "b"
    with pytest.raises(ValueError, match="no answers"):
        most_common([])


def test_choices_stand_behind_their_letters() -> None:
    assert options(["x", "y"]) == "A. x\nB. y"
    with pytest.raises(ValueError, match="11 choices"):
        options(["x"] * 11)
