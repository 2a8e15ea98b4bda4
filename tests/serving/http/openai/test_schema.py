"""What a request under /v1 may hold, and what is said of the rest: everything that is wrong, by name, at once.

Covers `serving/http/openai/errors.py`, too.
"""

from __future__ import annotations

from typing import Any

import pytest

from llava_steering_plugin.serving.http.openai.errors import ApiError
from llava_steering_plugin.serving.http.openai.schema import ChatRequest, checked

MESSAGES = [{"role": "user", "content": "What is this?"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "auto"}}


def said_of(**changes: Any) -> ApiError:
    with pytest.raises(ApiError) as refused:
        checked(ChatRequest, {"model": "m", "messages": MESSAGES} | changes)
    assert refused.value.status == 400
    return refused.value


def taken(**changes: Any) -> ChatRequest:
    return checked(ChatRequest, {"model": "m", "messages": MESSAGES} | changes)


def user(*parts: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"messages": []}, "messages has to have 1 entry at least"),
        ({"messages": "Hi"}, "messages has to be a list"),
        ({"messages": [3]}, "messages[0] has to be an object"),
        (
            {"messages": [{"role": "tool", "content": "4"}]},
            "messages[0].role 'tool' is not supported; there are 'system'",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is missing"),
        ({"messages": user()}, "messages[0].content has to have 1 entry at least"),
        ({"messages": user({"type": "input_audio"})}, "is of the type 'input_audio'; there are 'text', 'image_url'"),
        ({"messages": user({"type": "text"})}, "messages[0].content[0].text is missing"),
        ({"messages": user({"type": "image_url", "image_url": "x"})}, "content[0].image_url has to be an object"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "content[0].text holds half a character"),
        ({"model": 3}, "model has to be a text"),
        ({"max_tokens": -1}, "max_tokens has to be 1 at least"),
        ({"max_tokens": 2.0}, "max_tokens has to be a whole number"),
        ({"max_completion_tokens": "3"}, "max_completion_tokens has to be a whole number"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens and max_completion_tokens differ"),
        ({"temperature": 2.1}, "temperature has to be 2 at most"),
        ({"temperature": float("nan")}, "temperature has to be a finite number"),
        ({"top_p": True}, "top_p has to be a number"),
        ({"stop": ["a"] * 5}, "stop has to have 4 entries at most"),
        ({"stop": ""}, "stop[0] has to have 1 character at least"),
        ({"stop": 3}, "stop has to be a text or a list"),
        ({"n": 10**9}, "n has to be 8 at most"),
        ({"n": 0}, "n has to be 1 at least"),
        ({"max_tokens": 1_000_001}, "max_tokens has to be 1,000,000 at most"),
        ({"seed": 1 << 63}, "seed has to be 9,223,372,036,854,775,807 at most"),
        ({"seed": -(1 << 63) - 1}, "seed has to be -9,223,372,036,854,775,808 at least"),
        ({"stream": 1}, "stream has to be true or false"),
        ({"stream_options": {"include_usage": True}}, 'stream_options needs "stream": true'),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], said: str) -> None:
    refused = said_of(**changes)
    assert said in refused.text
    assert refused.body()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "field",
    [
        *({"tools": [{"type": "function"}]}, {"response_format": {"type": "json_object"}}, {"logprobs": True}),
        *({"frequency_penalty": 0.5}, {"logit_bias": {"5": 1}}, {"top_k": 5}, {"min_p": 0.1}, {"guided_json": {}}),
        *({"reasoning_effort": "high"}, {"logprobs": 0}, {"spelled_wrong": 1}),
    ],
    ids=lambda field: next(iter(field)),
)
def test_a_field_that_would_change_the_answer_and_is_not_followed_is_refused_by_name(field: dict[str, Any]) -> None:
    [name] = field
    refused = said_of(**field)
    assert refused.text.startswith(f"The request cannot be answered: {name} is not supported")
    assert (refused.code, refused.param) == ("unsupported_parameter", name)


def test_fields_that_change_nothing_are_taken() -> None:
    same = taken(
        tools=[],
        tool_choice="auto",
        frequency_penalty=0.0,
        logprobs=False,
        response_format={"type": "text"},
        user="somebody",
        metadata={"a": "b"},
        spelled_wrong=None,
        stop=None,
        n=None,
    )
    assert same == taken()


def test_messages_are_taken_as_clients_send_them_back() -> None:
    answered = {"role": "assistant", "content": "Red.", "refusal": None, "annotations": [], "tool_calls": None}
    request = taken(messages=[*MESSAGES, answered, *user(IMAGE, {"type": "text", "text": "And here?"})])
    assert [message.text for message in request.messages] == ["What is this?", "Red.", "And here?"]
    image = ("content[0].image_url", "data:image/png;base64,AAAA")
    assert [message.images for message in request.messages] == [[], [], [image]]


def test_stop_and_lengths_have_two_spellings_each() -> None:
    assert taken(stop="END").stop == taken(stop=["END"]).stop == ["END"]
    assert taken(max_tokens=7).tokens == taken(max_completion_tokens=7).tokens == 7
    assert taken().tokens is None


def test_everything_that_is_wrong_is_said_at_once_and_nothing_of_it_is_shown_at_length() -> None:
    wrong = [{"role": "x" * 10_000, "content": "?"}] * 100
    refused = said_of(messages=wrong, n=0, tools=[1], **{"y" * 10_000: 1})
    assert "messages[0].role" in refused.text and "and " in refused.text and len(refused.text) < 10_000
    few = said_of(n=0, tools=[1], max_tokens=-1)
    assert all(f"{name} " in few.text for name in ("n", "tools", "max_tokens")) and few.param is None
