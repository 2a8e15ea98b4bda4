"""POST /v1/chat/completions, asked by OpenAI's own client: answers, streams, errors, and what a worker refuses.

Requests that wait: test_waiting.py.

Its answers are compared with those of each adapter alone, on a model of its own.

Covers `serving/http/openai/answers.py` and `serving/http/openai/models.py`, too.
"""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from api_fixtures import LIMITS, asks, data_url, error_of, messages_of, post
from serving_fixtures import BASE_NAME, NAMES, Alone, Client, Question, wait_until

pytest_plugins = ["serving_fixtures", "api_fixtures"]


@pytest.fixture(autouse=True)
def unharmed(api: Client) -> Any:
    """After a test nothing is generated and nobody waits."""
    yield
    wait_until(lambda: api.health().items() >= {"status": "ok", "running": 0, "open": 0}.items())


@pytest.mark.parametrize("name", [*NAMES, BASE_NAME])
def test_every_model_answers_as_it_does_alone(
    openai_client: Any, alone: Alone, asked: list[Question], name: str
) -> None:
    for question in (asked[0], asked[-1]):
        answer = openai_client.chat.completions.create(**asks(question, model=name))
        [choice] = answer.choices
        assert choice.message.content == alone(None if name == BASE_NAME else name, question)
        assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
        assert answer.model == name and answer.id.startswith("chatcmpl-")
        used = answer.usage
        assert used.completion_tokens <= question.tokens and used.total_tokens - used.completion_tokens > 10


def test_a_stream_brings_role_text_reason_and_usage_and_ends(
    openai_client: Any, alone: Alone, asked: list[Question]
) -> None:
    more = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = openai_client.chat.completions.create(**asks(asked[0]), **more)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None and chunk.usage is None for chunk in chunks[1:])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == alone("cats", asked[0])
    whole = openai_client.chat.completions.create(**asks(asked[0]))
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, whole.choices[0].finish_reason]
    assert not last.choices and last.usage == whole.usage
    assert len({chunk.id for chunk in (*chunks, last)}) == 1


def test_a_stream_is_server_sent_events_that_end_with_done(api: Client, asked: list[Question]) -> None:
    response = post(api, asks(asked[-1], stream=True), stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.iter_lines(decode_unicode=True) if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line.removeprefix("data: ")) for line in lines[:-1])


def test_the_reason_is_length_where_the_answer_was_cut(openai_client: Any, asked: list[Question]) -> None:
    for spelled in ("max_tokens", "max_completion_tokens"):
        fields = asks(asked[0]) | {"max_tokens": None, spelled: 2}
        answer = openai_client.chat.completions.create(**fields)
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 2


def test_stops_are_no_part_of_the_answer_and_each_of_several_ends_it(
    openai_client: Any, alone: Alone, asked: list[Question]
) -> None:
    create = openai_client.chat.completions.create
    whole = alone("cats", asked[0])
    for stop in (whole[3:5], [whole[3:5], "never said"], ["never said", whole[3:5], whole[-2:]]):
        choice = create(**asks(asked[0], stop=stop)).choices[0]
        assert choice.message.content == whole[: whole.index(whole[3:5])] and choice.finish_reason == "stop"
        streamed = create(**asks(asked[0], stop=stop), stream=True)
        assert "".join(each.choices[0].delta.content or "" for each in streamed) == choice.message.content


def test_a_seed_gives_the_same_choices_again_and_others_beside_them(openai_client: Any, asked: list[Question]) -> None:
    def texts(**changes: Any) -> list[str]:
        fields = asks(asked[0], temperature=1.5, max_tokens=12, **changes)
        return [choice.message.content for choice in openai_client.chat.completions.create(**fields).choices]

    first = texts(n=3, seed=7)
    assert texts(n=3, seed=7) == first and len(set(first)) == 3
    assert texts(n=2, seed=8) == first[1:], "choice number i has seed + i"


def test_images_count_as_tokens_and_stand_anywhere_among_the_parts(
    openai_client: Any, alone: Alone, asked: list[Question]
) -> None:
    create = openai_client.chat.completions.create
    text = asked[0].prompt.replace("<image>\n", "")
    first = create(**asks(asked[0], messages=messages_of(asked[0], image_first=True)))
    assert first.choices[0].message.content == alone("cats", asked[0])
    plain = create(**asks(Question(text)))
    assert first.usage.prompt_tokens - plain.usage.prompt_tokens > 10


def test_several_choices_come_in_one_answer_and_in_one_stream(
    openai_client: Any, alone: Alone, asked: list[Question]
) -> None:
    create = openai_client.chat.completions.create
    answer = create(**asks(asked[0], n=3))
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {alone("cats", asked[0])}
    one = create(**asks(asked[0]))
    assert answer.usage.completion_tokens == 3 * one.usage.completion_tokens
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens
    texts, reasons = {0: "", 1: ""}, {}
    for chunk in create(**asks(asked[0], n=2), stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason
    assert set(texts.values()) == {alone("cats", asked[0])} and set(reasons.values()) == {one.choices[0].finish_reason}


def test_a_conversation_goes_on_with_what_was_answered(openai_client: Any, asked: list[Question]) -> None:
    create = openai_client.chat.completions.create
    messages = messages_of(asked[0])
    answer = create(**asks(asked[0], messages=messages)).choices[0].message
    messages += [answer.model_dump(), {"role": "user", "content": "Are you sure?"}]
    assert create(**asks(asked[0], messages=messages)).choices[0].message.content


def test_models_are_listed_with_their_folder_and_their_base(openai_client: Any, shelf: Any) -> None:
    listed = {model.id: model for model in openai_client.models.list()}
    assert set(listed) == {*NAMES, BASE_NAME}
    for name in NAMES:
        assert (listed[name].root, listed[name].parent) == (name, BASE_NAME)
    assert listed[BASE_NAME].parent is None and listed[BASE_NAME].root
    assert openai_client.models.retrieve("cats") == listed["cats"]
    # The name on LLaVA's page is not that of the adapter, and will do.
    assert openai_client.models.retrieve("my-m.pt") == listed["my-mpt"]


def test_what_is_wrong_is_an_exception_of_openais_client(openai_client: Any, asked: list[Question]) -> None:
    import openai

    create = openai_client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="no model of that name here: did you mean 'cats'") as unknown:
        create(**asks(asked[0], model="cat"))
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("nobody")
    with pytest.raises(openai.BadRequestError, match="n has to be 8 at most") as wrong:
        create(**asks(asked[0], n=99, max_tokens=-1))
    assert "max_tokens has to be 1 at least" in str(wrong.value)
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        create(**asks(asked[0]), tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.BadRequestError, match="tool"):
        create(**asks(asked[0], messages=[{"role": "tool", "content": "4", "tool_call_id": "1"}]))
    with pytest.raises(openai.BadRequestError, match="tokens, images included; this model takes"):
        create(**asks(Question("A. USER: " + "\u20ac" * 1900 + " ASSISTANT:")))


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "not valid JSON"),
        (b"[]", 400, "not a JSON object"),
        (b"{}", 400, "model is missing; messages is missing"),
        (b"x" * (LIMITS.body_bytes + 1), 413, "longer than 1,048,576 bytes"),
        (b"[" * 9000, 413, "parts"),
    ],
    ids=["half", "list", "empty", "long", "deep"],
)
def test_a_body_that_is_no_request_is_refused(api: Client, body: bytes, status: int, said: str) -> None:
    response = post(api, None, data=body)
    assert response.status_code == status and said in error_of(response)["message"]


def test_images_and_texts_beyond_the_limits_are_refused(api: Client, asked: list[Question], tmp_path: Any) -> None:
    from PIL import Image

    large = tmp_path / "large.png"
    Image.new("RGB", (400, 400)).save(large)
    for url, said in (
        (data_url(large), "Image 1 has more than 90,000 pixels"),
        ("data:image/png;base64,AAAA", "Image 1 is damaged"),
        ("data:image/png;base64,A", "messages[1].content[1].image_url is not valid base64"),
        ("https://example.com/a.png", "no image is fetched from there"),
        ("file:///etc/passwd", "files are not read here"),
    ):
        response = post(api, asks(asked[0], messages=messages_of(asked[0], url=url)))
        assert response.status_code == 400 and said in error_of(response)["message"]
    many = messages_of(asked[0])
    many[1]["content"] += 2 * many[1]["content"][1:]
    response = post(api, asks(asked[0], messages=many))
    assert response.status_code == 400 and "more than 2 images" in error_of(response)["message"]
    response = post(api, asks(Question("A. USER: " + "x" * 2001 + " ASSISTANT:")))
    assert response.status_code == 413 and "longer than 2,000 characters" in error_of(response)["message"]


def test_other_addresses_and_methods_have_the_same_errors(api: Client) -> None:
    nowhere = requests.get(f"{api.address}/v1/nowhere", timeout=30)
    assert nowhere.status_code == 404 and error_of(nowhere)["code"] == "not_found"
    method = requests.get(f"{api.address}/v1/chat/completions", timeout=30)
    assert method.status_code == 405 and error_of(method)["code"] == "method_not_allowed"
    foreign = requests.get(f"{api.address}/v1/models", headers={"Origin": "http://elsewhere.example"}, timeout=30)
    assert foreign.status_code == 403 and error_of(foreign)["code"] == "forbidden"
    # Without an administrator there is nothing to load adapters with.
    assert requests.post(f"{api.address}/v1/load_lora_adapter", json={}, timeout=30).status_code == 404


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_nobody_waits_for_ends(api: Client, asked: list[Question], stream: bool) -> None:
    body = asks(Question(asked[0].prompt, asked[0].image, 300), stream=stream, n=2)
    with pytest.raises(requests.exceptions.ReadTimeout) if not stream else post(api, body, stream=True) as response:
        if stream:
            assert next(response.iter_lines())
        else:
            post(api, body, timeout=0.2)
    wait_until(lambda: api.health().items() >= {"running": 0, "open": 0}.items())


def test_requests_have_ids_in_answers_and_the_log_which_holds_nothing_of_them(
    api: Client, asked: list[Question], caplog: pytest.LogCaptureFixture
) -> None:
    secret = Question("A chat. USER: <image>\nWho is xyzzy? ASSISTANT:", asked[0].image)
    with caplog.at_level(logging.DEBUG, "llava_steering_plugin"):
        mine = post(api, asks(secret), headers={"X-Request-Id": "mine-5"})
        other = post(api, asks(secret, stop=["xyzzy"] * 5), headers={"X-Request-Id": "no\tid"})
        wait_until(lambda: caplog.text.count(" s\n") >= 2)
    assert mine.json()["id"] == mine.headers["X-Request-Id"] == "chatcmpl-mine-5"
    assert "chatcmpl-mine-5: answered after" in caplog.text
    assert other.headers["X-Request-Id"].startswith("chatcmpl-") and other.headers["X-Request-Id"] in caplog.text
    assert "refused with 400 (invalid_value)" in caplog.text
    assert "xyzzy" not in caplog.text and mine.json()["choices"][0]["message"]["content"] not in caplog.text


def test_a_model_whose_numbers_become_infinite_says_so(api: Client, worker: Any, asked: list[Question]) -> None:
    import torch

    def broken(module: Any, inputs: Any, output: Any) -> Any:
        return torch.full_like(output, float("nan"))

    handle = worker.model.lm_head.register_forward_hook(broken)
    try:
        response = post(api, asks(asked[0]))
        assert response.status_code == 500 and error_of(response)["code"] == "not_finite"
        assert post(api, asks(asked[0], stream=True)).status_code == 500, "the stream began before there was anything"
    finally:
        handle.remove()


def test_both_protocols_are_answered_at_the_same_time(api: Client, alone: Alone, asked: list[Question]) -> None:
    def ask(number: int) -> str:
        if number % 2:
            return api.answer("cats", asked[0])
        return str(post(api, asks(asked[0])).json()["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(8) as users:
        assert set(users.map(ask, range(8))) == {alone("cats", asked[0])}
