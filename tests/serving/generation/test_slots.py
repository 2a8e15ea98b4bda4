"""Who waits for a slot, who shares one, and when the next batch starts (`serving/generation/making.py`)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from llava_steering_plugin.serving.generation.answer import Answer
from llava_steering_plugin.serving.generation.request import (
    BUSY,
    NO_ANSWER,
    STOPPING,
    End,
    GenerationRequest,
    Piece,
    Problem,
)
from llava_steering_plugin.serving.generation.slots import Slots, Turn


def request(name: str) -> GenerationRequest:
    return GenerationRequest(adapter=name, prompt="")


def names(turn: Turn) -> list[str]:
    return [answer.request.adapter for answer in turn.answers if answer.request is not None]


class Model:
    """Makes answers when it is told to, in the threads of the slots."""

    def __init__(self) -> None:
        self.turns: list[tuple[list[str], Turn]] = []
        self.go = threading.Event()
        self.came = threading.Semaphore(0)

    def __call__(self, turn: Turn) -> None:
        self.turns.append((names(turn), turn))
        self.came.release()
        assert self.go.wait(60)
        for answer in turn.answers:
            answer.put(End("stop"))

    async def started(self) -> list[str]:
        """The names of the next turn, once it has a slot."""
        assert await asyncio.to_thread(self.came.acquire, timeout=60)
        return self.turns[-1][0]


async def settled(slots: Slots) -> None:
    """Wait for what has been put into the event loop already."""
    for _ in range(3):
        await asyncio.sleep(0)


def test_the_next_batch_gathers_until_the_first_tokens_of_the_one_before_are_there() -> None:
    async def run() -> None:
        model = Model()
        slots = Slots(model, 3, batch=3)
        answers = [slots.ask(request("a"))]
        assert await model.started() == ["a"]
        answers += [slots.ask(request(name)) for name in "bcde"]
        await settled(slots)
        assert (slots.taken, len(slots.running), len(slots.waiting)) == (1, 1, 4)
        model.turns[0][1].begun()
        assert await model.started() == ["b", "c", "d"]
        assert (slots.taken, len(slots.running), len(slots.waiting)) == (2, 4, 1)
        model.turns[0][1].begun()  # again, and late: it lets nobody start
        await settled(slots)
        assert len(slots.waiting) == 1
        model.go.set()
        assert [await answer.next() for answer in answers] == [End("stop")] * 5
        while slots.taken:
            await asyncio.sleep(0)
        assert (slots.running, slots.free) == ([], 3)

    asyncio.run(run())


def test_a_batch_waits_for_requests_that_are_being_read_but_not_when_it_is_full_and_not_for_long() -> None:
    async def run() -> None:
        model = Model()
        slots = Slots(model, 3, batch=3)
        with slots.arriving():
            slots.ask(request("a"))
            with slots.arriving():
                slots.ask(request("b"))
            await settled(slots)
            assert not slots.taken
        assert await model.started() == ["a", "b"]
        model.turns[-1][1].begun()
        with slots.arriving():
            for name in "cde":
                slots.ask(request(name))
            assert await model.started() == ["c", "d", "e"]
            model.turns[-1][1].begun()
            slots.ask(request("f"))
            assert await model.started() == ["f"], "the other one takes too long to arrive"
        model.go.set()
        while slots.taken:
            await asyncio.sleep(0)

    asyncio.run(run())


def test_a_request_that_is_refused_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_steering_plugin.serving.generation.slots.GATHERING", 3600)

    async def run() -> None:
        model = Model()
        slots = Slots(model, 1, batch=2)
        with pytest.raises(ValueError, match="refused"), slots.arriving():
            slots.ask(request("a"))
            raise ValueError("refused")
        assert await model.started() == ["a"]
        model.go.set()
        while slots.taken:
            await asyncio.sleep(0)

    asyncio.run(run())


def test_answers_that_are_put_back_come_first_and_those_that_nobody_wants_are_ended() -> None:
    async def run() -> None:
        began: list[list[str]] = []
        answers: list[Answer] = []
        done = threading.Event()

        def make(turn: Turn) -> None:
            began.append(names(turn))
            if len(began) == 1:
                done.wait(60)
                turn.put_back(turn.answers[1:])
            for answer in turn.answers:
                answer.put(End("stop"))

        slots = Slots(make, 1, batch=3)
        answers = [slots.ask(request(name)) for name in "abcd"]
        while not began:
            await asyncio.sleep(0)
        answers[2].cancel()
        done.set()
        ends = [await answer.next() for answer in answers]
        assert began == [["a", "b", "c"], ["b", "d"]]
        assert ends == [End("stop"), End("stop"), End("cancelled"), End("stop")]

    asyncio.run(run())


def test_answers_that_are_put_back_while_the_worker_stops_are_told_so() -> None:
    async def run() -> None:
        model = Model()
        slots = Slots(model, 1, batch=2)
        answers = [slots.ask(request(name)) for name in "ab"]
        assert await model.started() == ["a", "b"]
        model.turns[0][1].put_back(answers[1:])
        slots.stop()
        await settled(slots)
        model.go.set()
        stopped = End("error", problem=Problem.STOPPED, message=STOPPING)
        assert [await answer.next() for answer in answers] == [stopped, stopped]
        while slots.taken:
            await asyncio.sleep(0)
        assert len(model.turns) == 1

    asyncio.run(run())


@pytest.mark.parametrize("make", [lambda turn: None, lambda turn: 1 / 0])
def test_whatever_making_does_every_answer_ends_and_the_slot_is_free(make: Callable[[Turn], None]) -> None:
    async def run() -> None:
        freed: list[int] = []
        slots = Slots(make, 1, batch=2, changed=lambda: freed.append(slots.taken))
        answers = [slots.ask(request(name)) for name in "abc"]
        for answer in answers:
            assert await answer.next() == End("error", problem=Problem.FAILED, message=NO_ANSWER)
        while len(freed) < 2:
            await asyncio.sleep(0)
        assert slots.free == 1

    asyncio.run(run())


def test_an_answer_that_waits_leaves_the_queue_when_nobody_wants_it() -> None:
    async def run() -> None:
        model = Model()
        slots = Slots(model, 1)
        first, second, third = (slots.ask(request(name)) for name in "abc")
        assert await model.started() == ["a"]
        second.cancel()
        assert await second.next() == End("cancelled") and slots.waiting == [third]
        model.go.set()
        assert await third.next() == await first.next() == End("stop")
        assert [made for made, _ in model.turns] == [["a"], ["c"]]

    asyncio.run(run())


def test_without_threads_all_are_told_that_the_worker_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        slots = Slots(lambda turn: turn.answers[0].put(Piece("x", 1)), 1, batch=2)

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            answers = [slots.ask(request(name)) for name in "abc"]
            for answer in answers:
                assert await answer.next() == End("error", problem=Problem.FAILED, message=BUSY)
        while slots.taken:
            await asyncio.sleep(0)
        assert slots.free == 1

    asyncio.run(run())
