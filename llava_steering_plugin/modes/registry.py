"""Look up the installed tuning modes: a read-only view of the entry-point group `llava_steering.modes`."""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_args, get_type_hints

from llava_steering_plugin.errors import ArgumentsError, SteeringError, listing, nearest
from llava_steering_plugin.modes.base import Mode

GROUP = "llava_steering.modes"

logger = logging.getLogger(__name__)


def names() -> list[str]:
    """Return the names of all registered modes, sorted. No mode is imported."""
    return sorted(_found())


def loadable() -> dict[str, type[Mode]]:
    """Return all modes that can be loaded, by name. A broken one is left out with a warning: it may not be wanted."""
    modes = {}
    for name in names():
        try:
            modes[name] = get(name)
        except SteeringError as error:
            logger.warning("%s", error)
    return modes


def get(name: str) -> type[Mode]:
    """Import and return the mode registered as `name`.

    Raises:
        ArgumentsError: nothing is registered under that name.
        SteeringError: the registered object cannot be imported, is no mode, or several packages register the name.
    """
    found = _found()
    if name not in found:
        _found_on.cache_clear()  # it may have been installed while this process runs
        found = _found()
    if name not in found:
        known = ", ".join(sorted(found)) or "none; is llava-steering-plugin installed with pip?"
        raise ArgumentsError(f"unknown tuning mode {name!r}: {nearest(name, found)}Registered: {known}")
    entry, *others = found[name]
    if others:
        raise SteeringError(
            f"the tuning mode {name!r} is registered by several packages: "
            f"{', '.join(f'{_origin(each)} ({each.value})' for each in found[name])}. Uninstall all but one."
        )
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


def configured(name: str, settings: Mapping[str, Any]) -> Mode:
    """Return the mode registered as `name` with these settings. `Mode.problems` says what is wrong with their values.

    Args:
        name: of a registered mode.
        settings: by the names of the mode's fields; fields left out keep their defaults.

    Raises:
        ArgumentsError: an unknown mode, or settings that it does not have or that are of another type (all listed).
        SteeringError: as for `get`.
    """
    kind = get(name)
    types = get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    problems = [f"it has no {setting:.100}, only {', '.join(known)}" for setting in settings if setting not in known]
    problems += [
        f"{setting} is {value!r:.100} where {_spelled(types[setting])} is expected"
        for setting, value in settings.items()
        if setting in known and not _is_a(value, types[setting])
    ]
    if problems:
        raise ArgumentsError(listing(f"the tuning mode {name!r} cannot take these settings", problems))
    return kind(**settings)


def _is_a(value: object, expected: Any) -> bool:
    kinds = get_args(expected) or (expected,)
    # bool is an int and an int is a good float to Python; a rank of True is a mistake, a dropout of 0 is none.
    # An integer may be longer than a float can be.
    return type(value) in kinds or (type(value) is int and float in kinds and abs(value) <= sys.float_info.max)


def _spelled(expected: Any) -> str:
    return " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in get_args(expected) or (expected,))


def _found() -> dict[str, list[EntryPoint]]:
    return _found_on(tuple(sys.path))


@functools.cache
def _found_on(path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    """Return what the packages on `path`, which is sys.path, register. Reading that takes as long as a small load."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        same = found.setdefault(entry.name, [])
        # One package found twice (an editable install beside its source) is no conflict.
        if entry.value not in [other.value for other in same]:
            same.append(entry)
    return found


def _origin(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown distribution"
