"""The newest state of an answer passes from a thread to a coroutine."""

from __future__ import annotations

import asyncio
import threading

from llava_steering_plugin.serving.http.latest import LatestState


def test_a_slow_reader_gets_the_newest_state_and_then_the_end() -> None:
    async def read() -> list[bytes | None]:
        latest = LatestState()
        for state in (b"1", b"12", b"123"):
            latest.put(state)
        first = await latest.get()
        latest.put(b"1234")
        latest.close(lambda: None)
        return [first, await latest.get(), await latest.get(), await latest.get()]

    assert asyncio.run(read()) == [b"123", b"1234", None, None]


def test_states_of_a_thread_come_in_their_order_and_the_last_one_always_does() -> None:
    async def read() -> list[bytes]:
        latest, got = LatestState(), []

        def write() -> None:
            for number in range(1000):
                latest.put(b"%04d" % number)
            latest.close(lambda: None)

        thread = threading.Thread(target=write)
        thread.start()
        while (state := await latest.get()) is not None:
            got.append(state)
        thread.join()
        return got

    for _ in range(20):
        got = asyncio.run(read())
        assert got == sorted(got) and got[-1] == b"0999"


def test_what_is_released_at_the_end_is_released_once_also_if_nobody_reads() -> None:
    released: list[None] = []

    async def end() -> None:
        latest = LatestState()
        latest.close(lambda: released.append(None))
        latest.close(lambda: released.append(None))
        await asyncio.sleep(0)

    asyncio.run(end())
    assert released == [None]


def test_a_thread_that_outlives_the_server_is_not_disturbed() -> None:
    async def make() -> LatestState:
        return LatestState()

    latest = asyncio.run(make())
    latest.put(b"late")
    latest.close(lambda: None)
