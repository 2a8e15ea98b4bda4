"""Find out what comes before the language model in a training: the vision tower and the projector."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from llava_steering_plugin.adapters.counts import numel
from llava_steering_plugin.adapters.fit.base_model import read_config
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.upstream.projector import build_projector


@dataclass(frozen=True)
class Vision:
    """Describes what comes before the language model.

    Attributes:
        parameters: of projector and newline embedding; None if unknown.
        projector: settings for `build_projector`; None if unknown.
        newline: parameters of the newline embedding of anyres.
        tower: config.json of the vision tower; None if it cannot be read.
        notes: why the projector's parameters are unknown.
    """

    parameters: int | None = None
    projector: Any = None
    newline: int = 0
    tower: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def image_tokens(tower: Mapping[str, Any]) -> int:
    """Return how many tokens an image of one tile has, by config.json of the vision tower."""
    # A CLIP of both halves keeps the vision tower's settings apart.
    settings = tower.get("vision_config") or tower
    return int((settings.get("image_size", 224) // settings.get("patch_size", 32)) ** 2)


def find_vision(flags: Namespace, described: Mapping[str, Any], hidden_size: int) -> Vision:
    """Return the vision tower and the projector that a training uses.

    Args:
        flags: of the training.
        described: config.json of the base.
        hidden_size: width of the language model.
    """
    if "mm_vision_tower" in described:
        # The base brings its projector; LLaVA keeps that one whatever the flags say.
        tower, _ = _read_tower(described["mm_vision_tower"])
        return _with_projector(described, described.get("mm_hidden_size"), hidden_size, tower)
    if not flags.vision_tower:
        return _unknown("the base has none, and --vision_tower is not given")
    tower, problem = _read_tower(flags.vision_tower)
    if tower is None:
        return _unknown(problem)
    # A CLIP of both halves keeps the vision tower's settings apart.
    width = tower.get("vision_config", tower).get("hidden_size")
    if not isinstance(width, int):
        problem = f"the config.json of --vision_tower {flags.vision_tower} names no hidden_size"
        return _unknown(problem, tower)
    return _with_projector(vars(flags), width, hidden_size, tower)


def _with_projector(
    source: Mapping[str, Any], width: int | None, hidden_size: int, tower: Mapping[str, Any] | None
) -> Vision:
    """Build the projector that `source` describes, for image tokens with `width` features, and count it."""
    if width is None:
        return Vision(tower=tower)
    settings = SimpleNamespace(
        mm_projector_type=source.get("mm_projector_type", "linear"), mm_hidden_size=width, hidden_size=hidden_size
    )
    try:
        with torch.device("meta"):
            count = numel(build_projector(settings))
    except ImportError:
        return Vision(tower=tower)  # the plan has noted that there is no LLaVA
    except (AttributeError, LookupError, TypeError, ValueError, SteeringError) as error:
        return _unknown(f"LLaVA does not build it from these settings ({error})", tower)
    newline = hidden_size if "unpad" in (source.get("mm_patch_merge_type") or "") else 0
    return Vision(count + newline, settings, newline, tower)


def _unknown(reason: str, tower: Mapping[str, Any] | None = None) -> Vision:
    return Vision(tower=tower, notes=(f"the projector is not counted: {reason}",))


def _read_tower(name: Any) -> tuple[Mapping[str, Any] | None, str]:
    """Return config.json of the vision tower, or None and the reason."""
    try:
        return read_config(str(name)), ""
    except SteeringError as error:
        return None, f"--vision_tower: {error}"
