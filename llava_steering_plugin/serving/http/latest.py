"""Passes the newest of a thread's results to a coroutine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress


class LatestState:
    """Holds the newest state of an answer; it replaces an older one that has not been fetched.

    Each state of an answer contains the ones before it, so nothing is lost, and a client that reads slowly costs the
    memory of one state. Create it in the coroutine's event loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._filled = asyncio.Event()
        self._guard = threading.Lock()
        self._state: bytes | None = None
        self._closed = False

    def put(self, state: bytes) -> None:
        """Set the newest state, from the thread; never waits."""
        with self._guard:
            self._state = state
        self._call_in_loop(self._filled.set)

    def close(self, then: Callable[[], None]) -> None:
        """Say, from the thread, that no state follows, and have `then` called in the event loop.

        Only the first call has an effect, so that `then` releases once what it releases.
        """
        with self._guard:
            if self._closed:
                return
            self._closed = True
        self._call_in_loop(then)
        self._call_in_loop(self._filled.set)

    async def get(self) -> bytes | None:
        """Return the newest state not yet fetched, None when no more will come."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            with self._guard:
                state, self._state = self._state, None
                if self._closed:
                    self._filled.set()
                # Otherwise two states came at once, and the newer one has been fetched.
                if state is not None or self._closed:
                    return state

    def _call_in_loop(self, what: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop has been closed: the server has stopped
            self._loop.call_soon_threadsafe(what)
