"""Failing answers, their threads and slots (`serving/generation/slots.py`, `upstream/worker_seam.py`)."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import requests
from ports import free_port
from serving_fixtures import STRICT, Alone, Client, Question, listening, wait_until

from llava_steering_plugin.serving.generation.request import GONE, NO_ANSWER, NOT_FINITE, Piece
from llava_steering_plugin.serving.generation.slots import Turn
from llava_steering_plugin.serving.http.app import build
from llava_steering_plugin.serving.http.protocol import FAILED

pytest_plugins = ["serving_fixtures"]
pytestmark = pytest.mark.usefixtures("unharmed")


def test_an_answer_that_cannot_be_begun_is_an_error_that_the_page_shows_and_no_empty_answer(
    worker: Any, asked: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(turn: Turn) -> None:
        turn.answers[0].put(Piece("the beginning", 1))
        raise RuntimeError("out of memory")

    with listening(build(worker, STRICT), free_port()) as client:
        monkeypatch.setattr(client.slots, "_make", fail)
        assert client.states("cats", asked[0])[-1] == {"text": NO_ANSWER, "error_code": FAILED}
        wait_until(lambda: client.free() == 4)


def test_an_adapter_that_is_removed_while_a_request_waits_is_said_to_have_gone_and_no_bug(
    worker: Any, shelf: Any, asked: list[Question], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker.catalog.put("passing-by", str(shelf / "cats"))
    held = threading.Event()
    handle = worker.model.lm_head.register_forward_hook(lambda *_: held.wait(60) and None)
    one_at_a_time = build(worker, replace(STRICT, running=1))
    with ThreadPoolExecutor(2) as users, listening(one_at_a_time, free_port()) as client:
        try:
            first = users.submit(client.states, "cats", asked[-1])
            wait_until(lambda: client.free() == 0)
            second = users.submit(client.states, "passing-by", asked[-1])
            wait_until(lambda: bool(client.slots.waiting))
            worker.catalog.drop("passing-by")
        finally:
            held.set()
            handle.remove()
        assert first.result()[-1]["error_code"] == 0
        assert second.result()[-1] == {"text": GONE, "error_code": FAILED}
    assert "unknown adapter 'passing-by'" in caplog.text and "Traceback" not in caplog.text


def test_a_failure_while_an_answer_is_made_is_an_error_that_the_page_shows(
    strict: Client, worker: Any, asked: list[Question]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = worker.model.lm_head.register_forward_hook(fail)
    try:
        states = strict.states("cats", asked[0])
    finally:
        handle.remove()
    assert states[-1]["error_code"] == 1
    assert "out of memory" not in states[-1]["text"]


def test_a_model_whose_numbers_overflow_has_an_error_that_says_so_and_no_empty_answer(
    strict: Client, worker: Any, shelf: Any, asked: list[Question], alone: Alone
) -> None:
    worker.catalog.put("diverged", str(shelf / "cats"))
    try:
        for module in worker.pool._adapters["diverged"].modules.values():
            for parameter in module.parameters():
                parameter.data.fill_(float("inf"))
        for question in asked[:2]:
            assert strict.states("diverged", question)[-1] == {"text": NOT_FINITE, "error_code": FAILED}
        assert strict.answer("cats", asked[0]) == alone("cats", asked[0])
    finally:
        worker.catalog.drop("diverged")


def test_an_answer_for_which_there_is_no_thread_is_an_error_and_gives_one_slot_back_and_is_not_made_later(
    worker: Any, asked: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no thread can be started the pool has queued the work already, and does it with the next request's."""
    passes: list[None] = []
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("generating"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with listening(build(worker, STRICT), free_port()) as client:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            assert client.states("cats", asked[0])[-1]["error_code"] == 1
        wait_until(lambda: client.free() == 4)
        handle = worker.model.model.register_forward_pre_hook(lambda *_: passes.append(None))
        try:
            assert client.answer("dogs", asked[-1])
            wait_until(lambda: client.health()["open"] == client.health()["running"] == 0)
            wait_until(lambda: client.free() == 4)
        finally:
            handle.remove()
        assert len(passes) == asked[-1].tokens


def test_generations_run_in_threads_that_stay(strict: Client, worker: Any, asked: list[Question]) -> None:
    used: set[int] = set()
    handle = worker.model.model.register_forward_pre_hook(lambda *_: used.add(threading.get_native_id()))
    try:
        for _ in range(6):
            assert strict.answer("cats", asked[-1])
    finally:
        handle.remove()
    assert used and used <= {thread.native_id for thread in threading.enumerate()}


def test_a_worker_that_is_ended_lets_short_answers_end_and_cuts_off_what_takes_longer_than_it_waits(
    worker: Any, asked: list[Question], alone: Alone
) -> None:
    held, steps = threading.Event(), list[int]()

    def hold(_: Any, args: Any, scores: Any) -> None:
        steps.append(len(scores))
        held.wait(60)

    app = build(worker, replace(STRICT, running=1))
    long = Question(asked[1].prompt, asked[1].image, 1000)
    handle = worker.model.lm_head.register_forward_hook(hold)
    try:
        with ThreadPoolExecutor(3) as users:
            with listening(app, free_port(), ending=held.set, timeout_graceful_shutdown=3) as client:
                short = users.submit(client.answer, "cats", asked[0])
                wait_until(lambda: client.free() == 0)
                others = [users.submit(client.states, "dogs", long), users.submit(client.states, "pets", long)]
                wait_until(lambda: len(client.slots.waiting) == 2)
            assert short.result() == alone("cats", asked[0])
            for other in others:
                with pytest.raises(requests.exceptions.RequestException):
                    other.result()
        threads = [thread for thread in client.slots._threads._threads]
        client.slots._threads.shutdown()
        assert not any(thread.is_alive() for thread in threads) and 2 in steps and len(steps) < 1000
    finally:
        handle.remove()
