"""Check vision tower and connector before a model is loaded: from flags, and from config.json of base and tower."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from llava_steering_plugin.adapters.fit.base_model import read_config
from llava_steering_plugin.components.image_tokens import (
    CONNECTOR,
    FEATURE,
    LAYER,
    clip_shape,
    connected,
    tower_name,
)
from llava_steering_plugin.components.named import (
    OWN_CONNECTORS,
    named_connector,
    named_tower,
    unknown_connector,
    unknown_tower,
)
from llava_steering_plugin.components.registry import CONNECTORS, LANGUAGE_MODELS, TOWERS, split
from llava_steering_plugin.errors import ArgumentsError, SteeringError, listing
from llava_steering_plugin.registered import Registered
from llava_steering_plugin.upstream.seams import require

# The entry of config.json that says which packages a checkpoint's components come from.
RECORD = "mm_components"
MODEL_TYPE = "model_type"
_GROUPS: dict[str, Registered[Any]] = {"mm_vision_tower": TOWERS, CONNECTOR: CONNECTORS, MODEL_TYPE: LANGUAGE_MODELS}


def check_installed(settings: Mapping[str, Any]) -> None:
    """Check that the components of a checkpoint are installed here.

    Args:
        settings: its config.json.

    Raises:
        ArgumentsError: some are not; the message says which package brings each.
    """
    if problems := absent_components(settings):
        raise ArgumentsError(listing("this LLaVA was made with components that are not installed here", problems))


def absent_components(settings: Mapping[str, Any]) -> list[str]:
    """Return which components of a checkpoint are not installed here, by its config.json, and who brings each."""
    recorded = settings.get(RECORD)
    problems = []
    for key, each in recorded.items() if isinstance(recorded, dict) else ():
        group = _GROUPS.get(key)
        if group is None or not isinstance(each, dict):
            continue
        name, package = str(each.get("name")), str(each.get("package"))
        # A tower or connector may have been replaced since.
        used = key == MODEL_TYPE or (settings.get(key) and split(str(settings[key]))[0] == name)
        if used and name not in group.names():
            problems.append(f"the {group.kind} {name!r} of the package {package!r}: install that package")
    return problems


def component_problems(flags: Namespace, described: Mapping[str, Any] | None) -> list[str]:
    """Return what is wrong with the vision tower and the connector of a training, one message each.

    Where neither flags nor base name a component, nothing is looked at that LLaVA would not refuse itself.

    Args:
        flags: of the training.
        described: config.json of the base; None while it is unknown.
    """
    base = described or {}
    try:
        check_installed(base)
    except ArgumentsError as error:
        return [str(error)]
    if not getattr(flags, "vision_tower", None):
        return []
    settings = vars(flags)
    found: list[str] = []
    if "mm_vision_tower" in base:
        found += _unlike_base(settings, base)
    tower = connector = None
    try:
        tower = named_tower(settings["vision_tower"], settings.get(LAYER), settings.get(FEATURE))
        if tower is None and (unknown := _unknown_tower(settings)):
            found.append(unknown)
    except SteeringError as error:
        found.append(str(error))
    try:
        connector = named_connector(settings.get(CONNECTOR))
        if connector is None and (unknown := _unknown_connector(settings)):
            found.append(unknown)
    except SteeringError as error:
        found.append(str(error))
    if found or (tower is None and connector is None):
        return found
    try:
        shape = tower.shape() if tower is not None else _clip(settings)
    except SteeringError as error:
        return [str(error)]
    if tower is not None and not tower.takes_4bit and settings.get("bits") in (4, 8):
        found.append(f"--bits {settings['bits']}: the vision tower {tower.name!r} cannot be used with packed weights")
    width = base.get("hidden_size")
    if shape is None or not isinstance(width, int):
        return found
    if connector is not None:
        found += [f"--{CONNECTOR} {settings[CONNECTOR]}: {each}" for each in connector.problems(shape.tokens, width)]
    elif settings.get(CONNECTOR) == "identity" and shape.tokens.width != width:
        found.append(
            f"--{CONNECTOR} identity: the vision tower gives tokens of width {shape.tokens.width}, and the language "
            f"model takes {width}"
        )
    if not found:
        found += _tiles(settings, shape.tokens, connected(settings.get(CONNECTOR), shape.tokens, width))
    return found


def _tiles(settings: Mapping[str, Any], before: Any, after: Any) -> list[str]:
    """Return why the tiles of an image cannot be laid out again: LLaVA does so by the tower's rows and columns."""
    merge = str(settings.get("mm_patch_merge_type") or "flat")
    if not merge.startswith("spatial"):
        return []
    if before.side is not None and not after.leading and after.side == before.side:
        return []
    what = "the tokens of this vision tower" if before.side is None or before.leading else "those of this connector"
    return [
        f"--mm_patch_merge_type {merge} lays the tokens of tiles out in rows, with image_newline where it unpads; "
        f"{what} are no longer the {before.side} x {before.side} squares that it counts on. Use flat, or a connector "
        "that keeps every token."
    ]


def _unlike_base(settings: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """Return where flags differ from the components that the base brings: LLaVA keeps the base's and notes the flag."""
    found = []
    for flag, key, default in (("vision_tower", "mm_vision_tower", None), (CONNECTOR, CONNECTOR, "linear")):
        group, there, here = _GROUPS[key], base.get(key) or default, settings.get(flag)
        named = [split(value)[0] for value in (there, here) if isinstance(value, str)]
        if there != here and any(name in group.names() for name in named):
            found.append(f"--{flag} {here}: the base has {there}, and LLaVA keeps that one. Give --{flag} {there}")
    return found


def _clip(settings: Mapping[str, Any]) -> Any:
    """Return the sizes of LLaVA's own tower; None if its config.json cannot be read here."""
    try:
        return clip_shape(read_config(str(tower_name(settings))), settings.get(FEATURE))
    except SteeringError:
        return None


def _unknown_tower(settings: Mapping[str, Any]) -> str | None:
    name = str(settings["vision_tower"])
    if os.path.exists(name) or name.startswith((os.sep, ".", "~")):
        return None  # a folder that is not here, as in a plan made on another machine: LLaVA says so
    builder = import_module("llava.model.multimodal_encoder.builder")
    asked = SimpleNamespace(**{"mm_vision_tower": name, LAYER: -1, FEATURE: "patch"})
    try:
        require(builder, "build_vision_tower")(asked, delay_load=True)  # of the tower it reads config.json
    except ValueError as error:
        return str(unknown_tower(name)) if "Unknown vision tower" in str(error) else None
    except Exception:  # noqa: BLE001  # no network, a damaged folder: LLaVA says so where it loads the tower
        return None
    return None


def _unknown_connector(settings: Mapping[str, Any]) -> str | None:
    text = str(settings.get(CONNECTOR, "linear"))
    if OWN_CONNECTORS.fullmatch(text):
        return None
    builder = import_module("llava.model.multimodal_projector.builder")
    asked = SimpleNamespace(**{CONNECTOR: text, "mm_hidden_size": 1, "hidden_size": 1})
    try:
        with torch.device("meta"):  # draws no random numbers: those of the training stay as they are
            require(builder, "build_vision_projector")(asked)
    except ValueError as error:
        return str(unknown_connector(text)) if "Unknown projector" in str(error) else None
    except Exception:  # noqa: BLE001  # a fork's that needs more than sizes
        return None
    return None
