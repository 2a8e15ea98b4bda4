"""Gives waiting answers slots in which they are made, several at a time. All of it runs in the event loop.

Where answers may share a batch, one batch starts after the other: while the model reads the prompts of one, those of
the next gather. Two that read prompts at the same time would only slow each other down. The first one waits for
requests that are being read, but not for long: the first of several that come together would else be answered alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from llava_steering_plugin.serving.generation.answer import Answer, Observer
from llava_steering_plugin.serving.generation.request import BUSY, NO_ANSWER, STOPPING, End, GenerationRequest, Problem

logger = logging.getLogger(__name__)

# Seconds that an answer waits, at most, for others to share its batch. A request is read in a few milliseconds.
GATHERING = 0.05
_STOPPED = End("error", problem=Problem.STOPPED, message=STOPPING)


class Turn:
    """The answers that have got a slot together. Its methods are for the thread that makes them.

    Attributes:
        answers: those that are made in this slot.
    """

    def __init__(self, slots: Slots, answers: Sequence[Answer]):
        self.answers = list(answers)
        self._slots = slots
        self._loop = asyncio.get_running_loop()
        self._holds = True

    def begun(self) -> None:
        """Say that the first tokens are there, so that the next batch may start."""
        self._call(lambda: self._slots.let_start(self))

    def generated(self, rows: int, steps: int) -> None:
        """Say how many rows have been generated together, and in how many passes."""
        if self._slots.observer is not None:
            self._slots.observer.generated(rows, steps)

    def put_back(self, answers: Sequence[Answer]) -> None:
        """Give answers their place at the front of the queue back: they cannot be in this batch."""
        for answer in answers:
            self.answers.remove(answer)
        if answers:
            self._call(lambda: self._slots.take_back(answers))

    def fail(self, message: str) -> None:
        """End all answers that have no end yet with an error."""
        for answer in self.answers:
            answer.put(End("error", problem=Problem.FAILED, message=message))

    def release(self) -> None:
        """Free the slot; only the first call has an effect."""
        self._call(self._release)

    def _release(self) -> None:
        if self._holds:
            self._holds = False
            self._slots.free_slot(self)

    def _call(self, what: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop has been closed: the server has stopped
            self._loop.call_soon_threadsafe(what)


class Slots:
    """Starts waiting answers as slots become free.

    Args:
        make: makes the answers of a turn in a thread and ends them; what it raises is logged.
        count: of the slots.
        batch: most answers that share a slot.
        changed: called whenever a slot has become free.

    Attributes:
        taken: how many slots are taken. One is free when nothing is generated in it any more.
        waiting: answers that have no slot yet, the next one first.
        observer: is told of all answers, and of the batches.
    """

    def __init__(
        self, make: Callable[[Turn], None], count: int, batch: int = 1, changed: Callable[[], None] = lambda: None
    ):
        self.count = count
        self.batch = batch
        self.taken = 0
        self.waiting: list[Answer] = []
        self.observer: Observer | None = None
        self._make = make
        self._changed = changed
        self._turns: list[Turn] = []
        self._arriving: set[object] = set()
        self._starting: Turn | None = None
        self._stopped = False
        # Threads that stay: a new one for every batch would leave memory behind.
        self._threads = ThreadPoolExecutor(count, "generating")

    @property
    def free(self) -> int:
        """The number of slots that are not taken."""
        return self.count - self.taken

    @property
    def running(self) -> list[Answer]:
        """The answers that are being made."""
        return [answer for turn in self._turns for answer in turn.answers if not answer.ended]

    def ask(self, request: GenerationRequest) -> Answer:
        """Return an answer that will be made when its turn comes. Whoever asks reads it to its end, or cancels it."""
        answer = Answer(request)
        answer.when_cancelled = lambda: self._forget(answer)
        answer.observer = self.observer
        if self.observer is not None:
            self.observer.asked(answer)
        if self._stopped:
            answer.put(_STOPPED)
            return answer
        self.waiting.append(answer)
        loop = asyncio.get_running_loop()
        if self._arriving and len(self.waiting) < self.batch:
            loop.call_later(GATHERING, self.fill)
        else:  # not at once: requests that come together share a batch
            loop.call_soon(self.fill)
        return answer

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """Have answers that could share a batch wait for what is asked for in the block, or after it.

        One that takes long to arrive is waited for no more.
        """
        request = object()
        self._arriving.add(request)
        late = asyncio.get_running_loop().call_later(GATHERING, self._arrived, request)
        try:
            yield
        finally:
            late.cancel()
            self._arrived(request)

    def _arrived(self, request: object) -> None:
        self._arriving.discard(request)
        if not self._arriving and self.waiting:
            asyncio.get_running_loop().call_soon(self.fill)

    def fill(self) -> None:
        """Start answers that wait, as far as slots are free."""
        while self.free > 0 and self.waiting and self._starting is None:
            turn = Turn(self, self._next())
            self.taken += 1
            self._turns.append(turn)
            if self.batch > 1:
                self._starting = turn
            try:
                self._threads.submit(self._run, turn)
            except RuntimeError as error:  # the system has no more threads; one of the pool may still take it
                logger.error("an answer could not be started: %s", error)
                turn.fail(BUSY)
                turn.release()

    def _next(self) -> list[Answer]:
        """Take the answers of the next batch out of the queue."""
        first = self.waiting[0]
        most = 1 if first.alone else self.batch
        chosen = [first, *(other for other in self.waiting[1:] if not other.alone)][:most]
        self.waiting = [answer for answer in self.waiting if answer not in chosen]
        return chosen

    def _run(self, turn: Turn) -> None:
        try:
            if not all(answer.ended for answer in turn.answers):
                self._make(turn)
        except Exception:  # otherwise only this thread's future would know of it
            logger.exception("an answer failed")
        finally:
            turn.fail(NO_ANSWER)  # those without an end
            turn.release()

    def let_start(self, turn: Turn) -> None:
        """Let the next batch start, after `turn`."""
        if self._starting is turn:
            self._starting = None
            self.fill()

    def take_back(self, answers: Sequence[Answer]) -> None:
        """Put answers at the front of the queue, but those that nobody wants any more."""
        ended = [answer for answer in answers if answer.cancelled or self._stopped]
        self.waiting = [answer for answer in answers if answer not in ended] + self.waiting
        for answer in ended:
            answer.put(End("cancelled") if answer.cancelled else _STOPPED)

    def free_slot(self, turn: Turn) -> None:
        """Free the slot of a turn."""
        self.taken -= 1
        self._turns.remove(turn)
        self.let_start(turn)
        self._changed()
        self.fill()

    def stop(self) -> None:
        """End all answers, and those that are asked for from now on: the process is about to end."""
        self._stopped = True
        waiting, self.waiting = self.waiting, []
        for answer in (*self.running, *waiting):
            answer.put(_STOPPED)

    def _forget(self, answer: Answer) -> None:
        """Take an answer that waits out of the queue: nobody wants it any more."""
        if answer in self.waiting:
            self.waiting.remove(answer)
            answer.put(End("cancelled"))
