"""The tuning modes that are installed: a read-only view of the entry-point group `llava_steering.modes`."""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint, entry_points

from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.modes.base import Mode

GROUP = "llava_steering.modes"


def names() -> list[str]:
    """The names of all registered modes, sorted. Loads none of them."""
    return sorted(_found())


def get(name: str) -> type[Mode]:
    """The mode registered as `name`.

    Raises:
        ArgumentsError: nothing is registered under that name.
        SteeringError: what is registered cannot be loaded, or is no mode.
    """
    found = _found()
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(sorted(found)) or "none; is llava-steering-plugin installed with pip?"
        raise ArgumentsError(f"unknown tuning mode {name!r}: {hint}Registered: {known}")
    entry = found[name]
    try:
        loaded = entry.load()
    except Exception as error:
        raise SteeringError(
            f"the tuning mode {name!r} ({entry.value}, from {_origin(entry)}) cannot be loaded: {error!r}. "
            "Mend or uninstall that package."
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Mode) and loaded.name == name):
        raise SteeringError(
            f"{entry.value} (from {_origin(entry)}) is registered as tuning mode {name!r} and is no subclass of "
            f"llava_steering_plugin.modes.base.Mode with name = {name!r}. docs/adding-a-mode.md shows one."
        )
    return loaded


def _found() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _origin(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown distribution"
