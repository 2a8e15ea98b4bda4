"""Keeps the controller informed: sends heart beats, and the list of models whenever it has changed."""

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

    Upstream's worker sends one with every request, from its event loop, which therefore stops while the controller is
    slow or absent.

    Args:
        every: seconds between two heart beats; upstream's controller forgets a worker after 30.
    """

    def __init__(self, worker: AdapterWorker, every: float = 10.0):
        super().__init__(name="controller_link", daemon=True)
        self._worker = worker
        self._every = every
        self._registered: list[str] | None = None
        self._wake = threading.Event()
        self._stopped = False

    def changed(self) -> None:
        """Tell the controller at once: the list of models may have changed."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread after what it is doing."""
        self._stopped = True
        self._wake.set()

    def run(self) -> None:
        """Inform the controller until `stop`."""
        while not self._stopped:
            self._wake.clear()
            pause = self._every
            try:
                self._inform()
            except (requests.exceptions.RequestException, AssertionError, ValueError, KeyError) as error:
                # Upstream asserts that the controller answered, and reads its answer as JSON.
                logger.warning("cannot reach the controller at %s: %s", self._worker.controller_addr, error)
                self._registered = None
                pause = min(RETRY_SECONDS, self._every)
            self._wake.wait(pause)

    def _inform(self) -> None:
        names = self._worker.catalog.names()
        if names == self._registered:
            # Waits while the controller is away, and registers again if it has forgotten this worker.
            self._worker.send_heart_beat()
            names = self._worker.catalog.names() if self._wake.is_set() else names
        if names != self._registered:
            self._worker.register_to_controller()
            self._registered = names
