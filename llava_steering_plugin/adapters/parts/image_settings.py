"""Compares how a LLaVA cuts, encodes and marks images with how it did so when an adapter was trained."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llava_steering_plugin.adapters.fit.base_model import IMAGE_SETTINGS
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
    if not family_of(model).splices:
        return []
    trained, here = trained_settings(stored), vars(model.config)
    return [
        f"it was trained with {key} {trained.get(key)!r}; this model has {here.get(key)!r}"
        for key in sorted(trained.keys() | here.keys())
        if key.startswith(beginnings) and _plain(key, here.get(key)) != _plain(key, trained.get(key))
    ]


def _plain(key: str, value: Any) -> str:
    """Return a setting in a form that compares: missing, None and False are the same, and lists are tuples."""
    return json.dumps((_DEFAULTS.get(key) if value is None else value) or None)
