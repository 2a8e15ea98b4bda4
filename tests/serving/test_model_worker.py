"""The worker over real HTTP: every adapter answers as it does alone, whoever else is asking."""

from __future__ import annotations

import itertools
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving_fixtures import BASE_NAME, NAMES, Alone, Client, Question, made, wait_until

from llava_steering_plugin.errors import ArgumentsError, UpstreamError

pytest_plugins = ["serving_fixtures"]

SHOWN = ["cats", "dogs", "pets", "birds", "fish", "mixl.ora-x", "my-m.pt", "routed"]


def test_every_adapter_and_the_base_is_a_model(worker: Any, client: Client) -> None:
    import requests

    status = requests.post(f"{client.address}/worker_get_status", timeout=30).json()
    assert status == {"model_names": [BASE_NAME, *SHOWN], "speed": 1, "queue_length": 0}


def test_64_requests_at_once_over_8_adapters_give_the_texts_of_each_adapter_alone_also_when_some_hang_up(
    client: Client, worker: Any, alone: Alone, asked: list[Question]
) -> None:
    jobs = [(shown, name, question) for shown, name in zip(SHOWN, NAMES, strict=True) for question in asked]
    random.Random(0).shuffle(jobs)
    hung_up = 0

    def ask(job: tuple[int, tuple[str, str, Question]]) -> str | None:
        number, (shown, _, question) = job
        if number % 8 == 3:
            with client.begun(Question(question.prompt, question.image, 500).body(shown)):
                return None
        return client.answer(shown, question)

    with ThreadPoolExecutor(len(jobs)) as users:
        answers = list(users.map(ask, enumerate(jobs)))
    for answer, (_, name, question) in zip(answers, jobs, strict=True):
        if answer is None:
            hung_up += 1
        else:
            assert answer == alone(name, question), name
    assert hung_up == 8
    assert len({alone(name, asked[0]) for name in (None, *NAMES)}) == 9, "the adapters answer alike: nothing is shown"
    wait_until(lambda: client.free() == 4 and client.health()["open"] == 0)


def test_64_answers_in_as_many_slots_are_the_texts_of_each_adapter_alone(
    worker: Any, alone: Alone, asked: list[Question]
) -> None:
    jobs = [(name, question) for name in NAMES for question in asked]
    random.Random(1).shuffle(jobs)
    answers = made(worker, *(question.asked(name) for name, question in jobs), slots=len(jobs))
    assert [text.strip() for text, _ in answers] == [alone(name, question) for name, question in jobs]


def test_the_base_answers_as_without_any_adapter(client: Client, alone: Alone, asked: list[Question]) -> None:
    assert [client.answer(BASE_NAME, question) for question in asked[-2:]] == [
        alone(None, question) for question in asked[-2:]
    ]


def test_an_answer_comes_as_it_grows(client: Client, asked: list[Question]) -> None:
    texts = [state["text"] for state in client.states("cats", Question(asked[0].prompt, asked[0].image, 40))]
    assert len(texts) > 1
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


@pytest.fixture
def steps(worker: Any) -> Any:
    """Counts the passes through the decoder."""
    count: list[int] = []
    handle = worker.model.model.register_forward_pre_hook(lambda *_: count.append(1))
    yield count
    handle.remove()


def test_an_answer_for_a_client_that_has_hung_up_ends_within_a_few_tokens(
    client: Client, worker: Any, steps: list[int], asked: list[Question]
) -> None:
    with client.begun(Question(asked[0].prompt, asked[0].image, 1000).body("cats")):
        pass
    wait_until(lambda: client.free() == 4)
    made = len(steps)
    assert made < 200, "it went on although nobody listened"
    threading.Event().wait(0.3)
    assert len(steps) == made
    assert client.answer("cats", asked[0])


def test_a_client_that_hangs_up_while_it_waits_for_a_slot_costs_no_pass_through_the_model(
    client: Client, worker: Any, steps: list[int], asked: list[Question]
) -> None:
    import requests

    wait_until(lambda: client.free() == 4)
    client.slots.taken += 4  # somebody else's answers
    try:
        with pytest.raises(requests.exceptions.RequestException):
            client.post(asked[0].body("cats"), timeout=0.5)
        wait_until(lambda: client.health()["open"] == 0)
    finally:
        client.slots.taken -= 4
    assert client.answer("dogs", asked[-1])
    wait_until(lambda: client.free() == 4)
    assert len(steps) == asked[-1].tokens


def test_prompts_longer_than_the_context_are_refused_and_not_cut(
    client: Client, worker: Any, asked: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLaVA cuts the end of prompts with images off, and streams its refusal of longer ones as an answer."""
    for entry, question in (("tokenizer_model_max_length", asked[0]), ("max_position_embeddings", asked[-1])):
        monkeypatch.setattr(worker.model.config, entry, 8)
        (state,) = client.states("cats", question)
        assert state["error_code"] == 4 and re.search(r"has \d+ tokens; this model takes (8|7)\.", state["text"])
        monkeypatch.undo()
        assert client.answer("cats", question)


def test_a_base_that_is_an_adapter_or_that_is_not_there_is_refused_before_anything_is_loaded(shelf: Path) -> None:
    from llava_steering_plugin.serving.model_worker import AdapterWorker

    with pytest.raises(ArgumentsError, match="is an adapter"):
        AdapterWorker(str(shelf / "cats"), controller="", address="")
    with pytest.raises(UpstreamError, match=r"there is no folder .*nothing.* --model-path"):
        AdapterWorker(str(shelf / "nothing"), controller="", address="")
