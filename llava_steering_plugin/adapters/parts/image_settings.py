"""Compares how a model cuts, encodes and marks images with how it did so when an adapter was trained.

transformers' own classes say with names of their own which features they take, and leave the rest to a processor, which
no model knows. So an adapter that was trained in transformers says nothing of the rest, and over a model of
transformers nothing else is compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llava_steering_plugin.adapters.fit.base_model import IMAGE_SETTINGS, VIDEO_SETTINGS
from llava_steering_plugin.adapters.stored.folder import LLAVA_CONFIG, StoredAdapter
from llava_steering_plugin.errors import AdapterError
from llava_steering_plugin.hooks.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What upstream takes where a config lacks a setting.
_DEFAULTS = {
    "image_aspect_ratio": "square",
    "mm_patch_merge_type": "flat",
    "mm_use_im_patch_token": True,
    "mm_vision_select_feature": "patch",
}
# Settings of the features themselves. Of the others, a program that prepares its own images takes care itself.
SELECTED = ("mm_vision_select_",)
# The same in transformers.
_LAYER, _STRATEGY = "vision_feature_layer", "vision_feature_select_strategy"
_FEATURES = {"default": "patch", "full": "cls_patch"}


def own_settings(model: PreTrainedModel) -> dict[str, Any]:
    """Return the settings of a model's config, those of image features by LLaVA's names."""
    config: Any = model.config
    if family_of(model).splices:
        return dict(vars(config))
    layer, strategy = getattr(config, _LAYER, None), getattr(config, _STRATEGY, None)
    found: dict[str, Any] = {"mm_vision_select_layer": layer} if isinstance(layer, int) else {}
    return found | ({"mm_vision_select_feature": _FEATURES[strategy]} if strategy in _FEATURES else {})


def of_transformers(trained: Mapping[str, Any]) -> bool:
    """Tell whether a config is one of transformers' own models of several parts, and not a LLaVA's."""
    return isinstance(trained.get("text_config"), dict)


def trained_settings(stored: StoredAdapter) -> dict[str, Any]:
    """Return the LLaVA config that the adapter was trained with.

    Raises:
        AdapterError: it has none, as an adapter of version 0.1 without its config.json.
    """
    trained = stored.folder.llava_config
    if trained is None:
        raise AdapterError(
            f"{stored.path / LLAVA_CONFIG} is missing, and the header of the weights holds no copy of it, so it is "
            "unknown how images were encoded in training. Copy the adapter again, with all its files."
        )
    return trained


def differing_settings(
    model: PreTrainedModel, stored: StoredAdapter, beginnings: tuple[str, ...] = IMAGE_SETTINGS
) -> list[str]:
    """List the settings of images that are not as in training; nothing where the model takes no images.

    Args:
        beginnings: of the names of settings that are compared.

    Raises:
        AdapterError: the adapter does not say how images were encoded.
    """
    here, splices = own_settings(model), family_of(model).splices
    if not here:
        return []
    trained = trained_settings(stored)
    if not splices or of_transformers(trained):
        beginnings = SELECTED
    elif beginnings == IMAGE_SETTINGS:  # where the model says nothing of videos, it has been given none
        beginnings += tuple(key for key in here if key.startswith(VIDEO_SETTINGS) and here[key] is not None)
    keys = trained.keys() | here.keys() if splices else here.keys()
    return [
        f"it was trained with {key} {trained.get(key)!r}; this model has {here.get(key)!r}"
        for key in sorted(keys)
        if key.startswith(beginnings) and _plain(key, here.get(key)) != _plain(key, trained.get(key))
    ]


def _plain(key: str, value: Any) -> str:
    """Return a setting in a form that compares: missing, None and False are the same, and lists are tuples."""
    return json.dumps((_DEFAULTS.get(key) if value is None else value) or None)
