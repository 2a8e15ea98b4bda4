"""Keeps the controller informed: a heart beat now and then, and the list of models whenever it has changed."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import requests

if TYPE_CHECKING:
    from llava_steering_plugin.serving.model_worker import AdapterWorker

logger = logging.getLogger(__name__)

RETRY_SECONDS = 2.0


class ControllerLink(threading.Thread):
    """Registers the worker and sends upstream's heart beats, in a thread of its own.

    Upstream's worker sends one with every request, from its event loop: it stands still while the controller is slow,
    and for good while there is none.

    Args:
        every: seconds between two heart beats; upstream's controller forgets a worker after 30.
    """

    def __init__(self, worker: AdapterWorker, every: float = 10.0):
        super().__init__(name="controller_link", daemon=True)
        self._worker = worker
        self._every = every
        self._told: list[str] | None = None
        self._wake = threading.Event()
        self._stopped = False

    def changed(self) -> None:
        """The list of models may have changed: tells the controller at once."""
        self._wake.set()

    def stop(self) -> None:
        self._stopped = True
        self._wake.set()

    def run(self) -> None:
        while not self._stopped:
            self._wake.clear()
            pause = self._every
            try:
                self._announce()
            except (requests.exceptions.RequestException, AssertionError, ValueError, KeyError) as error:
                # Upstream asserts that the controller answered, and reads its answer as JSON.
                logger.warning("the controller at %s cannot be told: %s", self._worker.controller_addr, error)
                self._told = None
                pause = min(RETRY_SECONDS, self._every)
            self._wake.wait(pause)

    def _announce(self) -> None:
        names = self._worker.catalog.names()
        if names == self._told:
            # Waits for as long as the controller is away, and then registers if it has forgotten this worker.
            self._worker.send_heart_beat()
            names = self._worker.catalog.names() if self._wake.is_set() else names
        if names != self._told:
            self._worker.register_to_controller()
            self._told = names
