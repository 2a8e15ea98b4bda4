"""Requests to the API that wait for their turn: how many may, and what becomes of them meanwhile.

How they are counted: `serving/http/admission.py` and `serving/http/limits.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from adapter_files import header_of, set_header
from api_fixtures import LIMITS, asks, error_of, post
from ports import free_port
from serving_fixtures import Alone, Client, Question, holding, listening, wait_until

from llava_steering_plugin.adapters.stored.folder import HEADER

pytest_plugins = ["serving_fixtures", "changing_fixtures", "api_fixtures"]
pytest.importorskip("sse_starlette", reason="the API needs sse-starlette: run scripts/setup.sh")
pytest.importorskip("prometheus_client", reason="the API needs prometheus-client: run scripts/setup.sh")


@contextmanager
def narrow(worker: Any, **limits: int) -> Iterator[Client]:
    """The API with other limits. At the end of the block it makes no answer any more."""
    from llava_steering_plugin.serving.http.app import build
    from llava_steering_plugin.serving.http.openai.api import ApiSettings

    with listening(build(worker, replace(LIMITS, **limits), api=ApiSettings()), free_port()) as client:
        yield client
        wait_until(lambda: client.health().items() >= {"running": 0, "open": 0}.items())


def text_of(response: requests.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_more_than_may_wait_are_a_503_and_the_others_are_answered(
    worker: Any, alone: Alone, asked: list[Question]
) -> None:
    limits = {"running": 1, "batch": 2, "waiting": 2}
    with narrow(worker, **limits) as client, ThreadPoolExecutor(3) as users, holding(worker) as go:
        answers = [users.submit(post, client, asks(asked[0]))]
        wait_until(lambda: len(client.slots.running) == 1)
        answers += [users.submit(post, client, asks(asked[0])) for _ in range(2)]
        wait_until(lambda: len(client.slots.waiting) == 2)
        full = post(client, asks(asked[0]))
        assert full.status_code == 503 and full.headers["Retry-After"] and error_of(full)["code"] == "queue_full"
        go.set()
        assert {text_of(answer.result()) for answer in answers} == {alone("cats", asked[0])}


def test_a_request_may_fill_a_batch_of_each_slot_and_the_queue_and_for_more_answers_it_is_wrong(
    worker: Any, alone: Alone, asked: list[Question]
) -> None:
    with narrow(worker, running=1, batch=2, waiting=2) as client:
        choices = post(client, asks(asked[0], n=4)).json()["choices"]
        assert [choice["message"]["content"] for choice in choices] == 4 * [alone("cats", asked[0])]
        error = error_of(wrong := post(client, asks(asked[0], n=5)))
        assert wrong.status_code == 400 and error["param"] == "n" and "n has to be 4 at most" in error["message"]


def test_a_request_that_waits_is_told_when_its_adapter_was_replaced_by_one_that_is_prompted_differently(
    worker: Any, shown: set[str], shelf: Path, alone: Alone, asked: list[Question], tmp_path: Path
) -> None:
    other = shutil.copytree(shelf / "dogs", tmp_path / "other")
    set_header(other, **{HEADER: json.dumps(json.loads(header_of(other)[HEADER]) | {"conversation": "llava_llama_2"})})
    with narrow(worker, running=1, batch=1) as client, ThreadPoolExecutor(4) as users, holding(worker) as go:
        first = users.submit(post, client, asks(asked[0]))
        wait_until(lambda: len(client.slots.running) == 1)
        late = [users.submit(post, client, asks(asked[0], stream=stream)) for stream in (False, True)]
        same = users.submit(post, client, asks(asked[0], model="fish"))
        wait_until(lambda: len(client.slots.waiting) == 3)
        worker.catalog.put("cats", str(other))
        worker.catalog.put("fish", str(shelf / "dogs"))
        go.set()
        assert text_of(first.result()) == alone("cats", asked[0]), "it had begun"
        assert text_of(same.result()) == alone("dogs", asked[0]), "prompted as before"
        whole, streamed = (answer.result() for answer in late)
        assert whole.status_code == 503 and error_of(whole)["code"] == "model_replaced"
        assert "model_replaced" in streamed.text  # with a status of its own, or in a stream that has begun
        assert post(client, asks(asked[0])).status_code == 200, "asked again"
