"""Messages for users: all problems in one error, and the nearest known word beside an unknown one."""

from __future__ import annotations

import pytest

from llava_steering_plugin import errors
from llava_steering_plugin.errors import BaseMismatch, SteeringError, listing, nearest


def test_a_listing_shows_every_problem_on_a_line_of_its_own_below_the_headline() -> None:
    assert listing("2 flags are wrong", ["a is 1", "b is 2"]) == "2 flags are wrong:\n  - a is 1\n  - b is 2"


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("morse", ["mores", "mixlora"], "did you mean 'mores'? "),
        ("mores", iter(["moers", "lora"]), "did you mean 'moers'? "),
        ("zzz", ["mores", "mixlora"], ""),
        ("mores", [], ""),
        ("", ["mores"], ""),
    ],
)
def test_the_nearest_known_word_is_asked_for_and_nothing_where_none_is_near(
    word: str, known: list[str], hint: str
) -> None:
    assert nearest(word, known) == hint


def test_a_hint_can_show_several_words_the_most_similar_first_and_in_another_spelling() -> None:
    hint = nearest("cast", ["cats", "castle", "dogs", "cas"], spelled="--{}".format, at_most=2)
    assert hint == "did you mean --cas or --castle? "


def test_everything_that_the_package_raises_on_purpose_is_a_steering_error() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    kinds = [kind for kind in kinds if not issubclass(kind, Warning)]
    assert BaseMismatch in kinds and all(issubclass(kind, SteeringError) for kind in kinds)
