"""Hands the newest of a thread's results to a coroutine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress


class LatestState:
    """Holds one state: a newer one takes the place of one that nobody has fetched.

    Each state of an answer holds the ones before it, so nothing is lost, and a client that reads slowly costs the
    memory of one state. Made in the coroutine's event loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._filled = asyncio.Event()
        self._guard = threading.Lock()
        self._state: bytes | None = None
        self._closed = False

    def put(self, state: bytes) -> None:
        """From the thread; never waits."""
        with self._guard:
            self._state = state
        self._tell(self._filled.set)

    def close(self, then: Callable[[], None]) -> None:
        """From the thread: no state follows; `then` is called in the event loop, whether anyone still reads or not.

        Only the first time: what is given back there is given back once.
        """
        with self._guard:
            if self._closed:
                return
            self._closed = True
        self._tell(then)
        self._tell(self._filled.set)

    async def get(self) -> bytes | None:
        """The newest state not yet fetched, None when none will come."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            with self._guard:
                state, self._state = self._state, None
                if self._closed:
                    self._filled.set()
                # Neither: two states came at once, and the newer has been fetched.
                if state is not None or self._closed:
                    return state

    def _tell(self, what: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop has been closed: the server has stopped
            self._loop.call_soon_threadsafe(what)
