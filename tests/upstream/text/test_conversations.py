"""Conversation templates by name, and how a question about an image is written (`upstream/text/conversations.py`)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.upstream.text.conversations import about_an_image, checked_template


@pytest.fixture(autouse=True)
def needs_llava(patched_llava: object) -> None:
    """The templates are those of the llava under test."""


def test_a_template_that_llava_has_is_taken_and_a_slip_of_the_pen_is_told_what_was_meant() -> None:
    assert checked_template("vicuna_v1") == "vicuna_v1"
    with pytest.raises(ArgumentsError, match=r"unknown conversation template 'vicuna_v2'.*did you mean 'vicuna_v1'\?"):
        checked_template("vicuna_v2")
    with pytest.raises(ArgumentsError, match="unknown conversation template 'klingon' of the adapter 'pets'"):
        checked_template("klingon", "pets")


@pytest.mark.parametrize(("marked", "start"), [(False, "<image>"), (True, "<im_start><image><im_end>")])
def test_the_image_stands_before_the_question_in_the_marks_that_the_model_knows(marked: bool, start: str) -> None:
    config = SimpleNamespace(mm_use_im_start_end=marked)
    assert about_an_image("What is it?", config) == f"{start}\nWhat is it?"
    assert about_an_image("What is it?", SimpleNamespace()) == "<image>\nWhat is it?"
