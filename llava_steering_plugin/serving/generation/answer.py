"""An answer while it is made: events come from the thread that generates, a coroutine reads them and may cancel."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Protocol

from llava_steering_plugin.serving.generation.request import End, Event, GenerationRequest, Piece


class Observer(Protocol):
    """Counts all answers that slots make."""

    def asked(self, answer: Answer) -> None:
        """Note that an answer has been asked for; in the event loop."""

    def event(self, answer: Answer, event: Event) -> None:
        """Note an event of an answer, before it is joined with others; in the thread that puts it."""

    def generated(self, rows: int, steps: int) -> None:
        """Note that a batch of so many rows has been generated, in so many passes; in its thread."""


class Prepared(Protocol):
    """Says of an answer, once it has been read, what its slot has to know."""

    @property
    def alone(self) -> bool:
        """True if it cannot share a batch."""


class Answer:
    """One answer that has been asked for. Create it in the event loop of its reader.

    Pieces that have not been read yet are joined, so the thread never waits for the reader, and a slow reader costs
    the memory of one text.

    Attributes:
        request: what was asked; None once it has been made a row, or has ended: so nobody keeps prompt and images.
        adapter: the model's name in the pool.
        observer: is told of each event.
        row: as the model reads it, once it has had a turn.
        when_cancelled: called in the event loop.
    """

    def __init__(self, request: GenerationRequest):
        self.request: GenerationRequest | None = request
        self.adapter = request.adapter
        self.observer: Observer | None = None
        self.row: Prepared | None = None
        self.when_cancelled: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._filled = asyncio.Event()
        self._guard = threading.Lock()
        self._text: list[str] = []
        self._tokens = 0
        self._end: End | None = None
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        """True once nobody waits for the rest; for the thread, before each token."""
        return self._cancelled.is_set()

    @property
    def alone(self) -> bool:
        """True if it is known that it cannot share a batch."""
        return self.row is not None and self.row.alone

    @property
    def ended(self) -> bool:
        """True once the end has been put."""
        return self._end is not None

    def put(self, event: Event) -> None:
        """Add an event, from any thread; never waits. Events after the end are dropped."""
        with self._guard:
            if self._end is not None:
                return
            if isinstance(event, Piece):
                self._text.append(event.text)
                self._tokens = event.tokens
            else:
                self._end, self.request, self.row = event, None, None
        if self.observer is not None:
            self.observer.event(self, event)
        with suppress(RuntimeError):  # the loop has been closed: the server has stopped
            self._loop.call_soon_threadsafe(self._filled.set)

    async def next(self) -> Event:
        """Return the next event, waiting for it; after the end, the end again. May be cancelled and called again."""
        while True:
            await self._filled.wait()
            with self._guard:
                if self._text:
                    piece = Piece("".join(self._text), self._tokens)
                    self._text.clear()
                    if self._end is None:
                        self._filled.clear()
                    return piece
                if self._end is not None:
                    return self._end
                self._filled.clear()  # two pieces came at once, and both have been read

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._events()

    async def _events(self) -> AsyncIterator[Event]:
        while True:
            event = await self.next()
            yield event
            if isinstance(event, End):
                return

    def cancel(self) -> None:
        """Say, in the event loop, that nobody waits for the rest: it ends before its next token, or never begins."""
        if self._cancelled.is_set() or self.ended:
            return
        self._cancelled.set()
        if self.when_cancelled is not None:
            self.when_cancelled()
