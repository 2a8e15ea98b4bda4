"""Look up what installed packages register in a group of entry points, and tell who brings what is broken."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from llava_steering_plugin.errors import ArgumentsError, SteeringError, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Registered(Generic[T]):
    """A read-only view of a group of entry points, whose objects are subclasses of one class.

    Attributes:
        group: of the entry points.
        kind: what they are, for messages: "tuning mode".
        parent: their common class. It has `name`, which is that of the entry point.
        page: that shows how to write one.
        ours: names and objects that this package registers itself, as its setup.cfg does. They are known here too:
            after an update of an editable install, the metadata that pip wrote are older than the code.
    """

    group: str
    kind: str
    parent: type[T]
    page: str
    ours: tuple[tuple[str, str], ...] = ()

    def names(self) -> list[str]:
        """Return the names of all that is registered, sorted. Nothing is imported."""
        return sorted(self._found())

    def get(self, name: str) -> type[T]:
        """Import and return the class registered as `name`.

        Raises:
            ArgumentsError: nothing is registered under that name.
            SteeringError: the registered object cannot be imported, is no such class, or several packages register the
                name.
        """
        found = self._found()
        if name not in found:
            _found_on.cache_clear()  # it may have been installed while this process runs
            found = self._found()
        if name not in found:
            known = ", ".join(sorted(found)) or "none; is llava-steering-plugin installed with pip?"
            raise ArgumentsError(f"unknown {self.kind} {name!r}: {nearest(name, found)}Registered: {known}")
        entry, *others = found[name]
        if others:
            raise SteeringError(
                f"the {self.kind} {name!r} is registered by several packages: "
                f"{', '.join(f'{_origin(each)} ({each.value})' for each in found[name])}. Uninstall all but one."
            )
        try:
            loaded = entry.load()
        except Exception as error:
            raise SteeringError(
                f"the {self.kind} {name!r} ({entry.value}, from {_origin(entry)}) cannot be loaded: {error!r}. "
                "Mend or uninstall that package."
            ) from error
        named = isinstance(loaded, type) and issubclass(loaded, self.parent) and getattr(loaded, "name", None) == name
        if not named:
            raise SteeringError(
                f"{entry.value} (from {_origin(entry)}) is registered as {self.kind} {name!r} and is no subclass of "
                f"{self.parent.__module__}.{self.parent.__name__} with name = {name!r}. {self.page} shows one."
            )
        kind: type[T] = loaded
        return kind

    def package(self, name: str) -> str:
        """Return the distribution that registers `name`."""
        return _origin(self._found()[name][0])

    def _found(self) -> Mapping[str, list[EntryPoint]]:
        return _found_on(self.group, self.ours, tuple(sys.path))


@functools.cache
def _found_on(group: str, ours: tuple[tuple[str, str], ...], path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    """Return what the packages on `path`, which is sys.path, register. Reading that takes as long as a small load."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in [*entry_points(group=group), *(EntryPoint(name, value, group) for name, value in ours)]:
        same = found.setdefault(entry.name, [])
        # One package found twice (an editable install beside its source) is no conflict.
        if entry.value not in [other.value for other in same]:
            same.append(entry)
    return found


def _origin(entry: EntryPoint) -> str:
    if entry.dist is not None:
        return entry.dist.name
    # One of `ours`, of which the metadata do not know yet.
    return "llava-steering-plugin" if entry.value.startswith(f"{__package__}.") else "an unknown distribution"
