"""List the installed components: what each is, who brings it, what it needs, and its sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from llava_steering_plugin.components.base import ImageTokens, Tower, TowerShape
from llava_steering_plugin.components.registry import CONNECTORS, LANGUAGE_MODELS, TOWERS
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.registered import Registered


@dataclass(frozen=True)
class Listed:
    """One installed component.

    Attributes:
        kind: "vision tower", "connector" or "language model".
        name, package, summary: its name, the distribution that brings it, and what it is.
        missing: what keeps it from being used here; the empty string if nothing does.
        settings: those of a connector, with their defaults.
    """

    kind: str
    name: str
    package: str
    summary: str = ""
    missing: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


def installed() -> list[Listed]:
    """Return all installed components, by kind and name. One that cannot be loaded says why in `missing`."""
    groups: tuple[Registered[Any], ...] = (TOWERS, CONNECTORS, LANGUAGE_MODELS)
    return [_listed(group, name) for group in groups for name in group.names()]


def parameters(tower: Tower) -> int:
    """Count the parameters of a vision tower, on the meta device."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in tower.build().parameters())


def tokens_by_connector(shape: TowerShape, width: int) -> dict[str, ImageTokens | str]:
    """Return what each installed connector, with its default settings, makes of a tower's tokens; or why it cannot.

    Args:
        width: of the language model.
    """
    found: dict[str, ImageTokens | str] = {}
    for name in CONNECTORS.names():
        try:
            connector = CONNECTORS.get(name)()
        except SteeringError as error:
            found[name] = str(error)
            continue
        problems = connector.problems(shape.tokens, width)
        found[name] = "; ".join(problems) if problems else connector.tokens(shape.tokens, width)
    return found


def _listed(group: Registered[Any], name: str) -> Listed:
    package = group.package(name)
    try:
        kind = group.get(name)
    except SteeringError as error:
        return Listed(group.kind, name, package, missing=str(error))
    settings = {}
    if group is CONNECTORS and dataclasses.is_dataclass(kind):
        settings = {each.name: each.default for each in dataclasses.fields(kind)}
    return Listed(group.kind, name, package, kind.summary, kind.missing(), settings)
