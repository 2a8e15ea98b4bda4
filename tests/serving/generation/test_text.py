"""The text of an answer comes in pieces that are never taken back, and ends before a stop text."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tiny_llava import TinyLlava

from llava_steering_plugin.serving.generation.text import AnswerText, special_stops


@pytest.fixture(scope="module")
def tokenizer(tiny: TinyLlava) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny.llava, use_fast=False)


def pieces(text: AnswerText, ids: list[int]) -> list[str]:
    """The pieces of the text up to its end, what was held back last."""
    found = []
    for token in ids:
        found.append(text.add(token))
        if text.stopped:
            return found
    return [*found, text.rest()]


@pytest.mark.parametrize("seed", range(40))
def test_the_pieces_together_are_what_all_tokens_decode_to(tokenizer: Any, seed: int) -> None:
    """Random tokens: lone spaces, bytes that are parts of characters or of none, tokens that are no text."""
    chance = random.Random(seed)
    ids = [chance.randrange(len(tokenizer)) for _ in range(60)]
    space = tokenizer.convert_tokens_to_ids("\u2581")
    ids = [token if chance.random() > 0.2 else space for token in ids]
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces(AnswerText(tokenizer, ()), ids)) == whole


def test_a_character_of_several_tokens_comes_when_it_is_whole(tokenizer: Any) -> None:
    ids = tokenizer("a \u732b", add_special_tokens=False).input_ids
    found = pieces(AnswerText(tokenizer, ()), ids)
    assert "".join(found) == "a \u732b" and not any("\ufffd" in piece for piece in found)
    assert len(ids) > 4, "it is one token: nothing is shown"


@pytest.mark.parametrize("stops", [("USER:",), ("nothing", "SER"), ("R: Is", "USER:")])
def test_nothing_of_a_stop_text_is_ever_shown_whichever_comes_first(tokenizer: Any, stops: tuple[str, ...]) -> None:
    text = "It is red. USER: Is it?"
    found = pieces(AnswerText(tokenizer, stops), tokenizer(text, add_special_tokens=False).input_ids)
    first = min(place for stop in stops if (place := text.find(stop)) >= 0)
    assert "".join(found) == text[:first]


def test_what_only_looks_like_the_beginning_of_a_stop_text_is_shown(tokenizer: Any) -> None:
    ids = tokenizer("a U, an USE, a USER", add_special_tokens=False).input_ids
    assert "".join(pieces(AnswerText(tokenizer, ("USER:",)), ids)) == "a U, an USE, a USER"


def test_a_stop_text_that_is_a_special_token_ends_the_text_although_it_is_none(tokenizer: Any) -> None:
    special = special_stops(tokenizer, ("</s>", "USER:"))
    assert special == [[tokenizer.eos_token_id]]
    text = AnswerText(tokenizer, ("</s>", "USER:"), special)
    ids = tokenizer("It is red.", add_special_tokens=False).input_ids
    assert "".join(pieces(text, [*ids, tokenizer.eos_token_id, *ids])) == "It is red."
    assert text.stopped
