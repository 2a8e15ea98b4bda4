"""Admits requests within the worker's limits, on all routes that ask for answers, and gives their answers slots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llava_steering_plugin.serving.generation.request import BUSY
from llava_steering_plugin.serving.http.limits import Limits
from llava_steering_plugin.serving.http.protocol import Refused
from llava_steering_plugin.serving.idle_memory import IdleTrimmer

if TYPE_CHECKING:
    from llava_steering_plugin.serving.model_worker import AdapterWorker


class Admission:
    """The requests that a worker has taken, for the event loop.

    Attributes:
        limits: of the worker.
        open_requests: number of requests not answered yet, waiting ones included.
        slots: where answers are made: `slots.ask(request)`.
        trimmer: returns free memory when the worker is idle.
    """

    def __init__(self, worker: AdapterWorker, limits: Limits):
        self.limits = limits
        self.open_requests = 0
        self.trimmer = IdleTrimmer(self._is_idle)
        self.slots = worker.open_slots(limits.running, limits.batch, self.trimmer.schedule)

    @property
    def most(self) -> int:
        """The number of answers that may be open: those that are being made, a batch for each free slot, others."""
        return len(self.slots.running) + self.slots.free * self.limits.batch + self.limits.waiting

    @contextmanager
    def admitted(self, count: int = 1) -> Iterator[None]:
        """Count a request for so many answers as open inside the block: from before its body is read to their ends.

        Raises:
            Refused: more would be open than may run and wait (503).
        """
        if self.open_requests + count > self.most:
            raise Refused(503, BUSY)
        self.open_requests += count
        try:
            yield
        finally:
            self.open_requests -= count
            self.trimmer.schedule()

    def _is_idle(self) -> bool:
        return not self.open_requests and not self.slots.taken
