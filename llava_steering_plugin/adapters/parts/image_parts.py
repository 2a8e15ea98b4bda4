"""The parts of a LLaVA that turn images into embeddings, and the settings by which they do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from llava_steering_plugin.adapters.fit.base_model import IMAGE_SETTINGS, VIDEO_SETTINGS
from llava_steering_plugin.adapters.parts.image_settings import SELECTED, of_transformers
from llava_steering_plugin.errors import AdapterError, listing
from llava_steering_plugin.foreign_files import brief
from llava_steering_plugin.hooks.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Which states of a layer LLaVA's vision tower gives.
FEATURES = ("patch", "cls_patch")


def image_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the parameters between vision tower and decoder, by name: those that LLaVA trains with an adapter."""
    family = family_of(model)
    found, newline = family.projector(), family.newline()
    prefix = f"{found[0]}." if found is not None else None
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name == newline or (prefix is not None and name.startswith(prefix))
    }


def takes_images(model: PreTrainedModel) -> bool:
    """Tell whether a model is one of LLaVA's, with a splice for images."""
    return family_of(model).splices


def image_settings(trained: Mapping[str, Any]) -> dict[str, Any]:
    """Return those entries of a LLaVA's config that say how images and videos are cut, encoded and marked."""
    # LlavaNext's image_grid_pinpoints have heights first: the rest is its processor's matter.
    beginnings = SELECTED if of_transformers(trained) else IMAGE_SETTINGS + VIDEO_SETTINGS
    found = {key: value for key, value in trained.items() if key.startswith(beginnings)}
    # No choice of features is a choice of none: the model keeps its own, and can be compared with it.
    return {key: value for key, value in found.items() if value is not None or not key.startswith(SELECTED)}


def tower_settings(model: Any, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the vision tower reads when it is built, by their names in the tower.

    Raises:
        AdapterError: the tower cannot have them; the adapter is damaged.
    """
    tower = model.get_vision_tower()
    found = {
        name: trained[key]
        for name in ("select_layer", "select_feature")
        if trained.get(key := f"mm_vision_{name}") is not None and hasattr(tower, name)
    }
    states = getattr(getattr(tower, "config", None), "num_hidden_layers", None)
    problems = []
    if (layer := found.get("select_layer")) is not None:
        if type(layer) is not int or (isinstance(states, int) and not -states - 1 <= layer <= states):
            problems.append(f"mm_vision_select_layer is {brief(layer)}; the vision tower has {states} layers")
    if (feature := found.get("select_feature")) is not None and feature not in FEATURES:
        problems.append(f"mm_vision_select_feature is {brief(feature)}; it is one of {', '.join(FEATURES)}")
    if problems:
        raise AdapterError(listing("the adapter's LLaVA config is damaged", problems))
    return found
