"""Look up the installed tuning modes: a read-only view of the entry-point group `llava_steering.modes`."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from llava_steering_plugin.errors import ArgumentsError, SteeringError, listing
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.joint import JOIN, joint_kind, part_names
from llava_steering_plugin.modes.peft.settings import METHODS, NOT_HERE
from llava_steering_plugin.registered import Registered

_OURS = {
    "mixlora": "llava_steering_plugin.modes.mixlora:MixLoRA",
    "mores": "llava_steering_plugin.modes.mores:MoReS",
    "peft": "llava_steering_plugin.modes.peft.mode:Peft",
    "projector": "llava_steering_plugin.modes.projector:Projector",
}
_MODES = Registered(
    "llava_steering.modes",
    "tuning mode",
    Mode,  # type: ignore[type-abstract] # the parent of those that are registered; mypy fears that it is called
    "docs/adding-a-mode.md",
    tuple(_OURS.items()),
)

logger = logging.getLogger(__name__)


def names() -> list[str]:
    """Return the names of all registered modes, sorted. No mode is imported."""
    return _MODES.names()


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
    """Import and return the mode registered as `name`; for `a+b` the joint mode of two that are registered.

    Raises:
        ArgumentsError: nothing is registered under that name, or the two cannot be joined.
        SteeringError: the registered object cannot be imported, is no mode, or several packages register the name.
    """
    if JOIN in name and name not in names():
        return _joint(name)
    if name in (*METHODS, *NOT_HERE) and name not in names():
        raise ArgumentsError(f"{name!r} is a method of PEFT's: write peft in its place, and add --peft_method {name}")
    return _MODES.get(name)


def _joint(name: str) -> type[Mode]:
    parts = part_names(name)
    if not all(part.strip() for part in parts):
        raise ArgumentsError(f"the tuning mode {name!r} lacks a part; write two modes, such as mores{JOIN}mixlora")
    kinds, problems = [], []
    for part in parts:
        try:
            kinds.append(get(part))
        except ArgumentsError as error:
            problems.append(str(error))
    if problems:
        raise ArgumentsError("; ".join(problems))
    return joint_kind(kinds)


def known(name: str) -> bool:
    """Say whether a mode is registered under a name, or all parts of a joint one are. No mode is imported."""
    found = names()
    return name in found or all(part in found for part in part_names(name))


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
    has = [field.name for field in dataclasses.fields(kind)]
    problems = [f"it has no {setting:.100}, only {', '.join(has)}" for setting in settings if setting not in has]
    problems += [
        f"{setting} is {value!r:.100} where {_spelled(types[setting])} is expected"
        for setting, value in settings.items()
        if setting in has and not _is_a(value, types[setting])
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
