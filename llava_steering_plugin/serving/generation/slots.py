"""Gives answers slots in which they are made, and lets the others wait. All of it runs in the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from llava_steering_plugin.serving.generation.answer import Answer, Observer
from llava_steering_plugin.serving.generation.request import BUSY, NO_ANSWER, End, GenerationRequest, Problem

logger = logging.getLogger(__name__)


class Slots:
    """Starts waiting answers as slots become free.

    Args:
        make: makes an answer in a thread and puts all events but perhaps the end; what it raises is logged.
        count: of the slots.
        changed: called whenever a slot has become free.

    Attributes:
        count: of the slots.
        taken: how many of them are taken. A slot is free when nothing is generated in it any more.
        waiting: answers that have no slot yet.
        running: answers that have one.
        observer: is told of all answers.
    """

    def __init__(self, make: Callable[[Answer], None], count: int, changed: Callable[[], None] = lambda: None):
        self.count = count
        self.taken = 0
        self.waiting: list[Answer] = []
        self.running: list[Answer] = []
        self.observer: Observer | None = None
        self._make = make
        self._changed = changed
        # Threads that stay: a new one for every answer would leave memory behind.
        self._threads = ThreadPoolExecutor(count, "generating")

    @property
    def free(self) -> int:
        """The number of slots that are not taken."""
        return self.count - self.taken

    def ask(self, request: GenerationRequest) -> Answer:
        """Return an answer that will be made when its turn comes. Whoever asks reads it to its end, or cancels it."""
        answer = Answer(request)
        answer.when_cancelled = lambda: self._forget(answer)
        answer.observer = self.observer
        if self.observer is not None:
            self.observer.asked(answer)
        self.waiting.append(answer)
        self.fill()
        return answer

    def fill(self) -> None:
        """Start answers that wait, as long as there are free slots."""
        while self.free > 0 and self.waiting:
            answer = self.waiting.pop(0)
            self.taken += 1
            self.running.append(answer)
            release = self._once(answer)
            try:
                self._threads.submit(self._run, answer, release)
            except RuntimeError as error:  # the system has no more threads; one of the pool may still take it
                logger.error("an answer could not be started: %s", error)
                answer.put(End("error", problem=Problem.FAILED, message=BUSY))
                release()

    def _run(self, answer: Answer, release: Callable[[], None]) -> None:
        try:
            if not (answer.cancelled or answer.ended):
                self._make(answer)
        except Exception:  # otherwise only this thread's future would know of it
            logger.exception("an answer failed")
            answer.put(End("error", problem=Problem.FAILED, message=NO_ANSWER))
        finally:
            answer.put(End("cancelled"))  # where there is no end yet
            release()

    def _once(self, answer: Answer) -> Callable[[], None]:
        """Return a function that frees the slot of an answer, from any thread, when it is called first."""
        loop, held = asyncio.get_running_loop(), [True]

        def release() -> None:
            if held:
                held.clear()
                self.taken -= 1
                self.running.remove(answer)
                self._changed()
                self.fill()

        def from_any_thread() -> None:
            with suppress(RuntimeError):  # the loop has been closed: the server has stopped
                loop.call_soon_threadsafe(release)

        return from_any_thread

    def _forget(self, answer: Answer) -> None:
        """Take an answer that waits out of the queue: nobody wants it any more."""
        if answer in self.waiting:
            self.waiting.remove(answer)
            answer.put(End("cancelled"))
