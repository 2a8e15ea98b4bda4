"""Find out what comes before the language model in a training: the vision tower and the projector."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from llava_steering_plugin.adapters.counts import numel
from llava_steering_plugin.adapters.fit.base_model import read_config
from llava_steering_plugin.components.base import ImageTokens, Tower, TowerShape
from llava_steering_plugin.components.image_tokens import (
    CONNECTOR,
    FEATURE,
    LAYER,
    clip_shape,
    connected,
    tower_name,
)
from llava_steering_plugin.components.named import named_connector, named_tower
from llava_steering_plugin.components.picture_layouts import PictureLayout, layout_of
from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.upstream.model.projector import build_projector
from llava_steering_plugin.upstream.train.forks import is_next


@dataclass(frozen=True)
class Vision:
    """Describes what comes before the language model.

    Attributes:
        parameters: of projector and newline embedding; None if unknown.
        projector: settings for `build_projector`; None if unknown.
        newline: parameters of the newline embedding of anyres.
        tower: the vision tower, a component or config.json of LLaVA's own; None if it cannot be read.
        shape: its sizes; None if unknown.
        tokens: what the language model gets for an image of one tile; None if unknown.
        notes: why the projector's parameters are unknown.
    """

    parameters: int | None = None
    projector: Any = None
    newline: int = 0
    tower: Tower | Mapping[str, Any] | None = None
    shape: TowerShape | None = None
    tokens: ImageTokens | None = None
    notes: tuple[str, ...] = ()


def find_vision(flags: Namespace, described: Mapping[str, Any], hidden_size: int) -> Vision:
    """Return the vision tower and the projector that a training uses.

    Args:
        flags: of the training.
        described: config.json of the base.
        hidden_size: width of the language model.
    """
    if "mm_vision_tower" in described:
        # The base brings its projector; LLaVA keeps that one whatever the flags say.
        source, where = described, f"the base's vision tower {described['mm_vision_tower']}"
    elif flags.vision_tower:
        source, where = vars(flags), f"--vision_tower {flags.vision_tower}"
    else:
        return _unknown("the base has none, and --vision_tower is not given")
    try:
        tower = _tower(source)
    except SteeringError as error:
        problem = f"{error}" if str(error).startswith("--") else f"--vision_tower: {error}"
        if source is described:
            return _with_projector(source, described.get("mm_hidden_size"), hidden_size, Vision())
        return _unknown(problem)
    shape = tower.shape() if isinstance(tower, Tower) else clip_shape(tower, source.get(FEATURE))
    found = Vision(tower=tower, shape=shape, tokens=_connected(source, shape, hidden_size))
    if source is described:
        return _with_projector(source, described.get("mm_hidden_size"), hidden_size, found)
    if not isinstance(tower, Tower) and not isinstance(tower.get("vision_config", tower).get("hidden_size"), int):
        return _unknown(f"the config.json of {where} names no hidden_size", found)
    return _with_projector(source, shape.tokens.width, hidden_size, found)


def next_layout(flags: Namespace, vision: Vision) -> tuple[PictureLayout | None, list[str]]:
    """Return how a training in LLaVA-NeXT lays pictures out; None for LLaVA. The list says what is not known of it.

    Args:
        flags: of the training; LLaVA-NeXT goes by them, also where the base's config.json has other settings.
    """
    if not is_next(flags) or vision.tokens is None or vision.shape is None:
        return None, []
    try:
        layout = layout_of(vars(flags), vision.tokens, vision.shape.image_size)
    except ArgumentsError as error:
        return None, [f"one tile a picture is counted: {error}"]
    if problems := layout.problems():
        return None, [f"one tile a picture is counted: {problem}" for problem in problems]
    videos = layout.video_problems() if getattr(flags, "video_folder", None) else []
    if getattr(flags, "video_folder", None) and not layout.frames:
        videos.append("without --frames_upbound it depends on their length how many frames are taken")
    return layout, [f"videos are not counted: {problem}" for problem in videos]


def _tower(source: Mapping[str, Any]) -> Tower | Mapping[str, Any]:
    """Return the vision tower: a component whose files are sound, or config.json of LLaVA's own.

    Raises:
        SteeringError: it is not there, or cannot be used.
    """
    name = tower_name(source)
    tower = named_tower(name, source.get(LAYER), source.get(FEATURE))
    if tower is None:
        return read_config(str(name))
    tower.shape()
    return tower


def _connected(source: Mapping[str, Any], shape: TowerShape, hidden_size: int) -> ImageTokens | None:
    """Return what the language model gets; None where the connector does not take the tower's tokens."""
    try:
        connector = named_connector(source.get(CONNECTOR))
        if connector is not None and connector.problems(shape.tokens, hidden_size):
            return None
        return connected(source.get(CONNECTOR), shape.tokens, hidden_size)
    except SteeringError:
        return None


def _with_projector(source: Mapping[str, Any], width: int | None, hidden_size: int, found: Vision) -> Vision:
    """Build the projector that `source` describes, for image tokens with `width` features, and count it."""
    if width is None:
        return found
    settings = SimpleNamespace(
        mm_projector_type=source.get(CONNECTOR, "linear"),
        mm_hidden_size=width,
        hidden_size=hidden_size,
        tokens=None if found.shape is None else found.shape.tokens,
    )
    try:
        if found.tokens is None and named_connector(settings.mm_projector_type) is not None:
            return _unknown("its connector does not take the tokens of the vision tower", found)
        with torch.device("meta"):
            count = numel(build_projector(settings))
    except ImportError:
        return found  # the plan has noted that there is no LLaVA
    except (AttributeError, LookupError, TypeError, ValueError, SteeringError) as error:
        return _unknown(f"LLaVA does not build it from these settings ({error})", found)
    newline = hidden_size if "unpad" in (source.get("mm_patch_merge_type") or "") else 0
    return replace(found, parameters=count + newline, projector=settings, newline=newline)


def _unknown(reason: str, found: Vision | None = None) -> Vision:
    return replace(found or Vision(), notes=(f"the projector is not counted: {reason}",))
