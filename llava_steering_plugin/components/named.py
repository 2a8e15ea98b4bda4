"""Make components of what flags and config.json say: `NAME`, or `NAME:` and what the component needs to know."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable
from typing import Any, get_type_hints

from llava_steering_plugin.components.base import Connector, Tower
from llava_steering_plugin.components.registry import CONNECTORS, TOWERS, split
from llava_steering_plugin.errors import ArgumentsError, listing, nearest

# LLaVA's own; a component of such a name is never asked.
OWN_CONNECTORS = re.compile(r"linear|identity|mlp\d+x_gelu")
_WORDS = {"true": True, "false": False}


def named_tower(name: Any, layer: Any = None, feature: Any = None) -> Tower | None:
    """Return the tower that `--vision_tower` or config.json names; None where it is no component's: LLaVA decides.

    Args:
        name: as it stands there.
        layer: --mm_vision_select_layer; None: the last.
        feature: --mm_vision_select_feature; None: patches.

    Raises:
        SteeringError: the component is broken, or lacks something that is to be installed.
    """
    if not isinstance(name, str) or os.path.exists(name):
        return None
    key, source = split(name)
    if key not in TOWERS.names():
        return None
    kind = TOWERS.get(key)
    if missing := kind.missing():
        raise ArgumentsError(f"the vision tower {key!r} cannot be used here: {missing}")
    return kind(source, -1 if layer is None else layer, feature or "patch")


def unknown_tower(name: str) -> ArgumentsError:
    """Return the error for a vision tower that neither LLaVA nor a component knows."""
    key, _ = split(name)
    known = TOWERS.names()
    contained = [each for each in known if each.partition("-")[0] in name.lower()]
    hint = f"did you mean '{contained[0]}:{name}'? " if contained and ":" not in name else nearest(key.lower(), known)
    return ArgumentsError(
        f"unknown vision tower {name!r}: {hint}Installed: {_listed(known)} (written NAME or NAME:SOURCE), and LLaVA's "
        "own CLIP, by its folder or its name on the hub"
    )


def named_connector(text: Any) -> Connector | None:
    """Return the connector that `--mm_projector_type` or config.json names; None where it is no component's.

    Raises:
        SteeringError: the component is broken, lacks something that is to be installed, or does not take the settings.
    """
    if not isinstance(text, str) or OWN_CONNECTORS.fullmatch(text):
        return None
    key, settings = split(text)
    if key not in CONNECTORS.names():
        return None
    kind = CONNECTORS.get(key)
    if missing := kind.missing():
        raise ArgumentsError(f"the connector {key!r} cannot be used here: {missing}")
    return kind(**_settings(kind, settings))


def unknown_connector(text: str) -> ArgumentsError:
    """Return the error for a connector that neither LLaVA nor a component knows."""
    key, _ = split(text)
    known = CONNECTORS.names()
    hint = nearest(key.lower(), [*known, "linear", "identity", "mlp2x_gelu"])
    return ArgumentsError(
        f"unknown connector {text!r}: {hint}Installed: {_listed(known)}, and LLaVA's own: identity, linear, mlp2x_gelu "
        "(mlp3x_gelu, ...)"
    )


def _settings(kind: type[Connector], text: str) -> dict[str, Any]:
    """Return the settings of "queries=64,layers=4" with their types.

    Raises:
        ArgumentsError: some are not the connector's, or no values for them; all are named.
    """
    types = get_type_hints(kind)
    known = [each.name for each in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    found: dict[str, Any] = {}
    problems = []
    for part in filter(None, text.split(",")):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            problems.append(f"{part!r} is no setting: write NAME=VALUE")
        elif name not in known:
            problems.append(f"it has no {name!r}: {nearest(name, known)}It has {_listed(known)}")
        else:
            try:
                found[name] = _WORDS[value.lower()] if types[name] is bool else types[name](value)
            except (LookupError, ValueError):
                problems.append(f"{name} is {value!r} where {types[name].__name__} is expected")
    if problems:
        raise ArgumentsError(listing(f"the connector {kind.name!r} cannot take these settings", problems))
    return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
