"""Count what an image becomes: after the vision tower, and after the connector, for a loaded model or from settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from llava_steering_plugin.components.base import ImageTokens, TowerShape
from llava_steering_plugin.components.named import named_connector, named_tower

CLASS_TOKEN = "cls_patch"
LAYER, FEATURE, CONNECTOR = "mm_vision_select_layer", "mm_vision_select_feature", "mm_projector_type"


def tower_name(settings: Mapping[str, Any]) -> Any:
    """Return the vision tower that a LLaVA's config, or the flags of a training, name."""
    return settings.get("mm_vision_tower") or settings.get("vision_tower")


def tower_shape(settings: Mapping[str, Any], read: Callable[[str], Mapping[str, Any]]) -> TowerShape:
    """Return the sizes of the vision tower, from files of settings alone.

    Args:
        settings: a LLaVA's config.json, or the flags of a training.
        read: returns config.json of LLaVA's own tower, a folder or a name on the hub.

    Raises:
        SteeringError: the component cannot be used.
        Exception: whatever `read` raises.
    """
    name, feature = tower_name(settings), settings.get(FEATURE)
    tower = named_tower(name, settings.get(LAYER), feature)
    return tower.shape() if tower is not None else clip_shape(read(str(name)), feature)


def clip_shape(described: Mapping[str, Any], feature: Any = None) -> TowerShape:
    """Return the sizes of LLaVA's own tower, a CLIP, by its config.json."""
    # A CLIP of both halves keeps the vision tower's settings apart. Absent ones are transformers' defaults.
    vision = described.get("vision_config") or described
    image = int(vision.get("image_size", 224))
    side, leading = image // int(vision.get("patch_size", 32)), int(feature == CLASS_TOKEN)
    tokens = ImageTokens(side * side + leading, int(vision.get("hidden_size", 768)), side, leading)
    return TowerShape(image, tokens, vision.get("num_hidden_layers", 12))


def connected(connector: Any, tokens: ImageTokens, width: int) -> ImageTokens:
    """Return what the connector makes of the tower's tokens.

    Args:
        connector: its name and settings, as config.json has them. LLaVA's own keep number and places.
        width: of the language model.
    """
    component = named_connector(connector)
    if component is None:
        return replace(tokens, width=width, parts=())
    return component.tokens(tokens, width)


def of_model(model: Any) -> ImageTokens | None:
    """Return what an image, or a tile of one, becomes in a loaded LLaVA; None if it takes no images."""
    find = getattr(model, "get_vision_tower", None)
    tower = find() if find else None
    if tower is None:
        return None
    config = model.config
    return connected(getattr(config, CONNECTOR, None), shape_of(tower, config).tokens, config.hidden_size)


def shape_of(tower: Any, config: Any) -> TowerShape:
    """Return the sizes of a loaded tower: a component's knows them, LLaVA's own has the config of its CLIP.

    Args:
        config: of the LLaVA.
    """
    shape = getattr(tower, "shape", None)
    if isinstance(shape, TowerShape):
        return shape
    return clip_shape(vars(tower.config), getattr(config, FEATURE, None))
