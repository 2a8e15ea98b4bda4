"""easy-VQA as LLaVA's data: cameras, test questions and conversations (`experiments.world`)."""

from __future__ import annotations

from collections import Counter

import numpy as np
from PIL import Image


def test_the_shifted_camera_moves_red_to_green_green_to_blue_and_blue_to_red() -> None:
    from experiments import world

    pixels = np.array([[[200, 20, 10], [10, 200, 20], [10, 20, 200], [90, 90, 90]]], dtype=np.uint8)
    seen = np.asarray(world.permuted(Image.fromarray(pixels)))
    assert seen[0].argmax(1).tolist()[:3] == [1, 2, 0]
    assert seen[0, 3].tolist() == [90, 90, 90]


def test_the_sample_has_a_third_of_each_kind_and_one_question_of_a_kind_per_picture() -> None:
    from experiments import world

    questions = world.Split.load("test").questions
    sample = world.test_sample(questions, 90)
    assert Counter(question.kind for question in sample) == {"colour": 30, "shape": 30, "yes/no": 30}
    assert len({(question.kind, question.image) for question in sample}) == 90
    assert sample == world.test_sample(questions, 90)
    assert sample != world.test_sample(questions, 90, seed=8)


def test_what_is_seen_in_a_picture_comes_from_answers_and_questions() -> None:
    from experiments import world

    asked = [
        world.Question(0, "what color is the triangle?", "red"),
        world.Question(1, "what is the blue shape?", "circle"),
        world.Question(2, "is there a circle?", "yes"),
    ]
    assert world.seen_in(asked) == {0: ("red", "triangle"), 1: ("blue", "circle"), 2: (None, None)}


def test_conversations_hold_every_question_once_three_about_one_picture_and_the_picture_first() -> None:
    from experiments import world

    questions = world.Split.load("test").questions[:200]
    made = world.conversations(questions)
    turns = [sample["conversations"] for sample in made]
    assert all(len(each) in (2, 4, 6) for each in turns)
    asked = [turn["value"].removeprefix("<image>\n") for each in turns for turn in each[::2]]
    assert Counter(asked) == Counter(question.text for question in questions)
    assert all("<image>" in each[0]["value"] for each in turns)
    assert not [turn for each in turns for turn in each[1:] if "<image>" in turn["value"]]


def test_questions_of_validation_and_test_are_about_different_pictures() -> None:
    from experiments import world

    questions = world.Split.load("test").questions
    validation, test = world.halves(questions)
    assert len(validation) + len(test) == len(questions) and min(len(validation), len(test)) > 4000
    assert not {one.image for one in validation} & {one.image for one in test}
