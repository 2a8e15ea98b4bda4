"""Lists the models that can be requested: the plain base and the adapters of a pool, by their names on the web page."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from llava_steering_plugin.adapters.fit.compatibility import fits
from llava_steering_plugin.adapters.stored.locate import AdapterSource, read
from llava_steering_plugin.errors import AdapterError, ArgumentsError, SteeringError
from llava_steering_plugin.inference.sources import checked_label
from llava_steering_plugin.pool.pool import BASE, AdapterPool
from llava_steering_plugin.serving.names import ServedAdapter, named

logger = logging.getLogger(__name__)

KEPT_REFUSALS = 100


class AdapterCatalog:
    """Adds, replaces and removes adapters, one at a time. An answer keeps the adapter with which it began.

    Attributes:
        base: the name under which the plain base is registered.
        rejected: the newest reasons why adapters were refused, by name; kept until an adapter of that name is loaded.
        followers: called after every attempt to change something, in the thread that made it.
    """

    def __init__(self, pool: AdapterPool, base: str):
        self.pool = pool
        self.base = base
        self.rejected: dict[str, str] = {}
        self.followers: list[Callable[[], None]] = []
        self._adapters: Mapping[str, ServedAdapter] = {}
        self._changing = threading.Lock()
        self._rejecting = threading.Lock()

    def names(self) -> list[str]:
        """Return the names that the page lists: the base, then the adapters in the order in which they were added."""
        return [self.base, *(adapter.shown for adapter in self._adapters.values())]

    def adapters(self) -> list[ServedAdapter]:
        """Return the adapters in the order in which they were added."""
        return list(self._adapters.values())

    def find(self, shown: str) -> str | None:
        """Return the pool's name of the model that the page calls `shown`; None if there is none."""
        if shown == self.base:
            return BASE
        return next((adapter.name for adapter in self._adapters.values() if adapter.shown == shown), None)

    def put(self, name: str, source: AdapterSource) -> ServedAdapter:
        """Add the adapter at `source`, a folder or a hub id, or replace the one of that name.

        Raises:
            SteeringError: it cannot be served, and nothing has changed; if the name is allowed, `rejected` keeps the
                reason.
        """
        checked_label(name)
        with self._change():
            try:
                stored = read(source, fits(self.pool.model))
                where, template = stored.folder.source, stored.config.conversation
                adapter = named(name, where, template, self.base, self._adapters.values())
                self.pool.load(name, stored)
            except SteeringError as error:
                self.reject(name, str(error))
                raise
            except Exception as error:  # a failing disk, full memory, or anything unexpected
                reason = f"{source} could not be loaded: {type(error).__name__}: {error}"
                self.reject(name, reason)
                raise AdapterError(reason) from error
            self.accept(name)
            self._adapters = {**self._adapters, name: adapter}
            mode = self.pool.details(name).full_name
        logger.info("serving %s as %s: %s", name, adapter.shown, mode)
        return adapter

    def drop(self, name: str) -> None:
        """Remove an adapter.

        Raises:
            ArgumentsError: there is none of that name.
        """
        with self._change():
            if name not in self._adapters:
                raise ArgumentsError(f"there is no adapter {name!r} to remove; there are: {', '.join(self._adapters)}.")
            # The name before the weights: no request finds a name without an adapter.
            self._adapters = {other: adapter for other, adapter in self._adapters.items() if other != name}
            self.pool.unload(name)
        logger.info("no longer serving %s", name)

    def reject(self, name: str, reason: str) -> None:
        """Keep the reason why an adapter is not served."""
        name, reason = printable(name), printable(reason)
        with self._rejecting:
            others = [item for item in self.rejected.items() if item[0] != name]
            self.rejected = dict(
                [*others, (name, reason)][-KEPT_REFUSALS:]
            )  # a new dict: another thread may be reading the old one

    def accept(self, name: str) -> None:
        """Forget why an adapter was not served."""
        with self._rejecting:
            self.rejected = {other: reason for other, reason in self.rejected.items() if other != printable(name)}

    def table(self) -> list[dict[str, Any]]:
        """Return a description of each adapter for the server's administrator."""
        return [
            {
                "name": adapter.name,
                "shown": adapter.shown,
                "source": adapter.source,
                "mode": details.mode,
                "settings": details.settings,
                "parameters": details.parameters,
                "bytes": details.bytes,
                "resident": details.resident,
                "conversation": details.conversation,
            }
            for adapter in self.adapters()
            if (details := self._details(adapter.name)) is not None
        ]

    @contextmanager
    def _change(self) -> Iterator[None]:
        try:
            with self._changing:
                yield
        finally:
            for follower in list(self.followers):
                follower()

    def _details(self, name: str) -> Any:
        try:
            return self.pool.details(name)
        except SteeringError:
            return None  # removed in the meantime


def printable(text: str) -> str:
    """Return the text with escapes for bytes that are no text, which names of files may hold."""
    return text.encode(errors="backslashreplace").decode()
