"""An answer passes from the thread that makes it to the coroutine that reads it (`serving/generation/request.py`)."""

from __future__ import annotations

import asyncio
import threading

from llava_steering_plugin.serving.generation.answer import Answer
from llava_steering_plugin.serving.generation.request import End, Event, GenerationRequest, Piece

REQUEST = GenerationRequest(adapter="cats", prompt="What is it?")


def test_a_slow_reader_gets_all_of_the_text_in_one_piece_and_then_the_end() -> None:
    async def read() -> list[Event]:
        answer = Answer(REQUEST)
        for number, text in enumerate(("It ", "is ", "a ")):
            answer.put(Piece(text, number + 1))
        first = await answer.next()
        answer.put(Piece("cat", 4))
        answer.put(End("stop", 5, 5))
        answer.put(Piece(" or not", 6))
        answer.put(End("cancelled"))
        return [first, await answer.next(), await answer.next(), await answer.next()]

    end = End("stop", 5, 5)
    assert asyncio.run(read()) == [Piece("It is a ", 3), Piece("cat", 4), end, end]


def test_no_text_of_a_thread_is_lost_or_turned_around_and_the_end_always_comes() -> None:
    async def read() -> tuple[str, Event]:
        answer = Answer(REQUEST)

        def write() -> None:
            for number in range(1000):
                answer.put(Piece(f"{number:04d}", number))
            answer.put(End("length"))

        thread = threading.Thread(target=write)
        thread.start()
        events = [event async for event in answer]
        thread.join()
        return "".join(event.text for event in events if isinstance(event, Piece)), events[-1]

    for _ in range(20):
        assert asyncio.run(read()) == ("".join(f"{number:04d}" for number in range(1000)), End("length"))


def test_waiting_for_the_next_event_can_be_given_up_and_loses_nothing() -> None:
    async def read() -> Event:
        answer = Answer(REQUEST)
        waiting = asyncio.ensure_future(answer.next())
        await asyncio.sleep(0)
        waiting.cancel()
        answer.put(Piece("late", 1))
        return await answer.next()

    assert asyncio.run(read()) == Piece("late", 1)


def test_the_request_goes_with_the_end_also_if_nobody_reads() -> None:
    async def end() -> Answer:
        answer = Answer(REQUEST)
        assert answer.request is REQUEST
        answer.put(End("stop"))
        return answer

    assert asyncio.run(end()).request is None


def test_a_thread_that_outlives_the_server_is_not_disturbed() -> None:
    async def make() -> Answer:
        return Answer(REQUEST)

    answer = asyncio.run(make())
    answer.put(Piece("late", 1))
    answer.put(End("stop"))
