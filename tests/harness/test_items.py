"""What lmms-eval hands to its models becomes questions, or is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.harness.items import Item, Request, item_of, questions_of

RED, TALL = Image.new("L", (8, 8), 200), Image.new("RGBA", (8, 30), "red")
SHOWN: list[Any] = [[RED], [], [RED, TALL], None, [None], RED, ["film.mp4"], [Image.new("RGB", (8, 1))]]
DOCUMENTS = {"shapes": {"test": [{"shown": shown} for shown in SHOWN]}}


def show(document: Any) -> Any:
    return document["shown"]


def item(number: int, text: Any = "What is it?", how: Any = show) -> Item:
    request: Request = (text, {"until": []}, how, number, "shapes", "test")
    return item_of(request, DOCUMENTS)


def test_items_of_no_one_and_several_pictures_become_questions() -> None:
    questions, sizes = questions_of([item(number) for number in range(6)], "cats")
    assert [question.id for question in questions] == [f"shapes/{number}" for number in range(6)]
    assert [len(question.images) for question in questions] == [1, 0, 2, 0, 0, 1]
    assert sizes[2] == [(8, 8), (8, 30)]
    assert {question.adapter for question in questions} == {"cats"}
    assert [picture.mode for picture in item(2).pictures()] == ["RGB", "RGB"]


def test_a_task_of_text_alone_shows_nothing() -> None:
    (question,), sizes = questions_of([item(0, ["Which?"], None)], "cats")
    assert (question.text, question.images, sizes) == ("Which?", (), [[]])


def test_the_pictures_of_an_item_are_opened_once_for_all_its_choices() -> None:
    opened = []

    def counted(document: Any) -> Any:
        opened.append(document)
        return document["shown"]

    questions, sizes = questions_of([item(0, "A", counted), item(0, "B", counted), item(2, "A", counted)], "cats")
    assert len(opened) == 2 and sizes == [[(8, 8)], [(8, 8)], [(8, 8), (8, 30)]]
    assert [question.text for question in questions] == ["A", "B", "A"]


def test_marks_in_the_text_are_as_many_as_pictures_or_none() -> None:
    (question,), _ = questions_of([item(2, "<image> or <image>?")], "cats")
    assert question.text == "<image> or <image>?"
    with pytest.raises(ArgumentsError, match=r"shapes/1 has 0 picture\(s\), and 1 <image> in its text"):
        questions_of([item(1, "What is <image>?")], "cats")


def test_videos_and_strips_of_pixels_are_refused_all_at_once() -> None:
    with pytest.raises(ArgumentsError) as raised:
        questions_of([item(6), item(0), item(7)], "cats")
    assert "shapes/6 has a str where a picture should be" in str(raised.value)
    assert "a picture of shapes/7 has 8 x 1 pixels" in str(raised.value)
