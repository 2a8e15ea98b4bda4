"""Memory is returned to the system when the worker is idle, and little is kept in the first place."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from typing import Any

import psutil
import pytest
from ports import free_port
from serving_fixtures import STRICT, Question, listening, wait_until

from llava_steering_plugin.serving.http.app import build
from llava_steering_plugin.serving.idle_memory import KEPT_OPERATIONS, keep_few_operations, return_free_memory

pytest_plugins = ["serving_fixtures"]


@pytest.fixture
def rests(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows whenever memory is given back, which happens soon."""
    given_back: list[None] = []
    monkeypatch.setattr("llava_steering_plugin.serving.idle_memory.IDLE_SECONDS", 0.05)
    monkeypatch.setattr("llava_steering_plugin.serving.idle_memory.return_free_memory", lambda: given_back.append(None))
    return given_back


@pytest.mark.usefixtures("unharmed")
def test_memory_is_given_back_when_the_answer_of_a_client_that_hung_up_has_ended_and_not_before(
    worker: Any, asked: list[Question], rests: list[None]
) -> None:
    held = threading.Event()
    passes: list[None] = []

    def hold(*_: Any) -> None:
        passes.append(None)
        if len(passes) > 5:  # the client has seen that its answer has begun
            held.wait(60)

    with listening(build(worker, STRICT), free_port()) as client:
        handle = worker.model.lm_head.register_forward_hook(hold)
        try:
            with client.begun(Question(asked[0].prompt, asked[0].image, 300).body("cats")):
                wait_until(lambda: len(passes) > 5)
            wait_until(lambda: client.health()["open"] == 0)
            assert client.free() == 3
            time.sleep(0.3)
            assert not client.health()["rested"], "the answer still holds its memory"
        finally:
            held.set()
            handle.remove()
        wait_until(lambda: client.health()["rested"])
        assert rests and client.free() == 4


@pytest.mark.usefixtures("unharmed")
def test_memory_is_given_back_after_a_change_of_adapters_for_which_nobody_asked_anything(
    worker: Any, shelf: Any, rests: list[None]
) -> None:
    followers = len(worker.catalog.followers)
    with listening(build(worker, STRICT), free_port()):
        worker.catalog.put("passing-by", str(shelf / "cats"))
        wait_until(lambda: bool(rests))
        time.sleep(0.3)
        rests.clear()
        worker.catalog.drop("passing-by")
        wait_until(lambda: bool(rests))
    assert len(worker.catalog.followers) == followers


def test_few_operations_are_kept_unless_the_environment_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in KEPT_OPERATIONS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "500")
    keep_few_operations()
    assert os.environ["LRU_CACHE_CAPACITY"] == "500"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "128"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other C libraries return memory at other times")
def test_free_pages_between_blocks_in_use_go_back_to_the_system() -> None:
    blocks = [bytes(1024) for _ in range(100_000)]
    in_use = blocks[::64]
    del blocks
    before = psutil.Process().memory_info().rss
    return_free_memory()
    assert before - psutil.Process().memory_info().rss > 50 << 20
    assert len(in_use) > 1000


def test_objects_that_refer_to_each_other_in_a_circle_are_freed() -> None:
    class Circle:
        def __init__(self) -> None:
            self.itself = self

    circle = weakref.ref(Circle())
    return_free_memory()
    assert circle() is None
