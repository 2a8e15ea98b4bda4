"""Watches a folder of adapter folders: serves new ones, loads changed ones again, and drops removed ones.

It polls every few seconds, because network file systems send no notices of the kernel. An adapter's weights are
replaced by one rename (`adapters.stored.writing`), so their time, size and inode number show every change. A file that
is being copied in place is loaded when two looks see the same.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from llava_steering_plugin.adapters.stored.folder import WEIGHTS
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.serving.catalog import AdapterCatalog, printable
from llava_steering_plugin.serving.option_checks import checked_folder

logger = logging.getLogger(__name__)

Signature = tuple[int, int, int]


class WatchedFolder(threading.Thread):
    """Keeps a catalog in step with a folder. It reports a broken adapter once and goes on serving the one before it.

    Args:
        changed: called after the catalog has changed.
        every: seconds between two looks.

    Raises:
        ArgumentsError: there is no such folder.
    """

    def __init__(self, folder: Path, catalog: AdapterCatalog, changed: Callable[[], None], every: float = 2.0):
        super().__init__(name="watched-folder", daemon=True)
        self.folder = checked_folder(folder)
        self._catalog = catalog
        self._changed = changed
        self._every = every
        self._seen: dict[str, Signature] = {}
        self._taken: dict[str, Signature] = {}
        self._refused: dict[str, Signature] = {}
        self._names: set[str] = set()
        self._trouble = ""
        self._stopped = threading.Event()

    def run(self) -> None:
        """Look at the folder every few seconds, until `stop`."""
        while not self._stopped.wait(self._every):
            try:
                self.look()
            except Exception as error:  # noqa: BLE001  # whatever a folder holds, the next look must come
                self._complain([error])

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()

    def look(self, settled: bool = False) -> bool:
        """Bring the catalog in step with the folder; return whether the catalog has changed.

        Args:
            settled: nothing is being copied, so one look is enough.
        """
        try:
            found, unread = self._found()
        except OSError as error:
            self._complain([error])
            return False
        self._complain(list(unread.values()))
        changed = False
        names = set(self._catalog.names()) | {adapter.name for adapter in self._catalog.adapters()}
        if self._names - names:  # one of them may have been in the way of an adapter that was refused
            for name in self._refused:
                self._taken.pop(name, None)
        self._names = names
        for name in (self._taken.keys() | self._refused.keys()) - found.keys() - unread.keys():
            self._taken.pop(name, None)
            self._refused.pop(name, None)
            changed |= self._drop(name)
        for name, signature in found.items():
            if self._taken.get(name) == signature or not (settled or self._seen.get(name) == signature):
                continue
            if (other := self._source(name)) is not None and not self._is_mine(name, other):
                # Try again at every look: the other one may be removed.
                self._refuse(name, signature, f"{name!r} is {other} already. Rename the folder.")
                continue
            self._taken[name] = signature  # even if it cannot be loaded: try again only after a change
            changed |= self._put(name, signature)
        self._seen = found
        if changed:
            self._changed()
        return changed

    def _found(self) -> tuple[dict[str, Signature], dict[str, OSError]]:
        """Return the adapters in the folder, and the errors of those that cannot be looked at but may be there."""
        found, unread = {}, {}
        for entry in sorted(self.folder.iterdir()):
            if entry.name.startswith("."):
                continue
            try:
                status = (entry / WEIGHTS).stat()
            except (FileNotFoundError, NotADirectoryError):
                continue  # no adapter, not yet or not any more
            except OSError as error:  # a file server that is away, a folder without permission
                unread[entry.name] = error
                continue
            found[entry.name] = (status.st_mtime_ns, status.st_size, status.st_ino)
        return found, unread

    def _complain(self, errors: Sequence[Exception]) -> None:
        """Log what cannot be read, once for the same errors."""
        trouble = "; ".join(map(str, errors))
        if trouble and trouble != self._trouble:
            text = f"{self.folder} cannot be read: {trouble}; adapters loaded from it are still served"
            logger.warning("%s", printable(text))
        self._trouble = trouble

    def _put(self, name: str, signature: Signature) -> bool:
        try:
            self._catalog.put(name, str(self.folder / name))
        except SteeringError as error:
            self._refuse(name, signature, str(error))
            return False
        self._refused.pop(name, None)
        return True

    def _refuse(self, name: str, signature: Signature, reason: str) -> None:
        """Log and keep the reason why an adapter is not served, once for its present state."""
        if self._refused.get(name) != signature:
            self._refused[name] = signature
            logger.warning("%s is not served: %s", printable(str(self.folder / name)), printable(reason))
            self._catalog.reject(name, reason)

    def _drop(self, name: str) -> bool:
        self._catalog.accept(name)
        if not self._is_mine(name, self._source(name)):
            return False
        try:
            self._catalog.drop(name)
        except SteeringError:
            return False  # an administrator has removed it in the meantime
        return True

    def _is_mine(self, name: str, source: str | None) -> bool:
        """Return whether `source` is the folder's own adapter, links followed."""
        return source is not None and os.path.realpath(source) == os.path.realpath(self.folder / name)

    def _source(self, name: str) -> str | None:
        """Return where the adapter of that name came from: this folder, a flag or an administrator."""
        return next((adapter.source for adapter in self._catalog.adapters() if adapter.name == name), None)
