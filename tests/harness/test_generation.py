"""What lmms-eval's tasks ask of a generation is followed, or refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.harness.generation import MAX_NEW_TOKENS, Generation, read_generation

GREEDY = {"max_new_tokens": 16, "num_beams": 1, "use_cache": True, "do_sample": False}


def test_a_greedy_task_is_asked_with_the_arguments_of_eval() -> None:
    given = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    assert read_generation(given | {"image_aspect_ratio": "original", "until": []}) == Generation(GREEDY, ())
    assert read_generation({}).arguments == GREEDY | {"max_new_tokens": MAX_NEW_TOKENS}


@pytest.mark.parametrize(
    ("given", "sampled"),
    [
        ({"temperature": 0.2, "top_p": 0.9}, {"temperature": 0.2, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 1, "top_k": 5}, {"temperature": 1, "top_k": 5}),
        ({"do_sample": True}, {}),
        ({"do_sample": False, "temperature": 0.7}, None),
        ({"do_sample": True, "temperature": 0, "top_p": 0}, None),
    ],
)
def test_tokens_are_sampled_where_the_task_says_so(given: dict[str, Any], sampled: dict[str, Any] | None) -> None:
    found = read_generation({"max_new_tokens": 16, **given}).arguments
    assert found == (GREEDY if sampled is None else GREEDY | {"do_sample": True} | sampled)


def test_beams_and_penalties_are_handed_on() -> None:
    found = read_generation({"max_new_tokens": 16, "num_beams": 3, "repetition_penalty": 1.2}).arguments
    assert found == GREEDY | {"num_beams": 3, "repetition_penalty": 1.2}


def test_an_answer_ends_before_the_first_of_the_texts_that_end_it() -> None:
    assert read_generation({"until": ["\n\n", "Q:"]}).cut("It is red. Q: Why?\n\nNo.") == "It is red."
    assert read_generation({"until": "USER:"}).cut(" red USER: hm") == "red"
    assert read_generation({"until": None}).cut("red\n\nblue") == "red\n\nblue"
    assert read_generation({"until": [""]}).cut("red") == "red"


def test_a_batch_ends_when_every_answer_holds_a_text_that_ends_it() -> None:
    words = {1: "</s>", 5: " red", 6: " Q:", 7: " blue"}
    tokenizer = SimpleNamespace(
        eos_token_id=1,
        batch_decode=lambda ids, **_: ["".join(words[i] for i in row if i != 1) for row in ids.tolist()],
    )
    (ended,) = read_generation({"until": ["Q:"]}).with_early_end(tokenizer)["stopping_criteria"]
    assert not ended(torch.tensor([[5, 6], [5, 7]]), None)
    assert ended(torch.tensor([[5, 6], [7, 1]]), None)
    assert "stopping_criteria" not in read_generation({"until": ["Q:"], "num_beams": 2}).with_early_end(tokenizer)
    assert "stopping_criteria" not in read_generation({"until": []}).with_early_end(tokenizer)


def test_all_that_cannot_be_followed_is_named_at_once() -> None:
    given = {"max_new_token": 5, "stop_sequences": ["x"], "num_beams": 0, "temperature": "hot", "until": 3}
    given |= {"do_sample": 1, "top_p": "x", "top_k": True, "repetition_penalty": -1}
    with pytest.raises(ArgumentsError) as raised:
        read_generation(given)
    said = str(raised.value)
    assert "max_new_token=5: did you mean 'max_new_tokens'?" in said
    numbers = ("temperature='hot'", "top_p='x'", "top_k=True", "repetition_penalty=-1")
    for wrong in ("stop_sequences", "num_beams=0", "until=3", "do_sample=1 is neither", *numbers):
        assert wrong in said
