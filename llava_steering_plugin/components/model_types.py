"""Find the language model that a config.json names by its `model_type`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from llava_steering_plugin.components.base import LanguageModel
from llava_steering_plugin.components.registry import LANGUAGE_MODELS
from llava_steering_plugin.errors import SteeringError


def language_models() -> Iterator[type[LanguageModel]]:
    """Yield the registered language models, without those that cannot be loaded: that is told where one is named."""
    for name in LANGUAGE_MODELS.names():
        with suppress(SteeringError):
            yield LANGUAGE_MODELS.get(name)


def of_llava_type(model_type: str) -> type[LanguageModel] | None:
    """Return what LLaVAs of that type are made of; None if no component makes them."""
    return next((each for each in language_models() if model_type in each.llava_types()), None)


def of_model_type(model_type: str) -> type[LanguageModel] | None:
    """Return the component for plain language models of that type; None if there is none."""
    return next((each for each in language_models() if each.model_type == model_type), None)
