"""The base that chat, worker and eval load through upstream's loader: what it is, and what is said where it is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError

from llava_steering_plugin.adapters.base_model import read_config
from llava_steering_plugin.errors import SteeringError, UpstreamError
from llava_steering_plugin.upstream.loading import name_for

# What upstream, transformers and torch raise over a base that is damaged, unknown to them or too large.
_FAILURES = (OSError, ValueError, TypeError, LookupError, ImportError, RuntimeError, AssertionError, SafetensorError)


def described(path: str, hint: str = "") -> dict[str, Any]:
    """The config.json of the model at `path`, a folder or a hub id.

    Args:
        hint: what to do where there is none, beginning with a blank.

    Raises:
        UpstreamError: there is none, or one that describes no model.
    """
    try:
        return read_config(path)
    except SteeringError as error:
        raise UpstreamError(f"{path} is no model that can be loaded: {error}{hint}") from error


def is_llava(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a LLaVA, with a vision tower."""
    return "mm_vision_tower" in config


def loading_name(path: str, config: Mapping[str, Any]) -> str:
    """A name from which upstream's rules load a model as what its config.json says it is, whatever it is called.

    They take it for a plain language model unless its name says otherwise.
    """
    if is_llava(config):
        return name_for(config["model_type"])
    from llava.mm_utils import get_model_name_from_path

    return str(get_model_name_from_path(path))


@contextmanager
def loading(path: str) -> Iterator[None]:
    """Around a call of upstream's loader: makes one message of whatever it fails at.

    Raises:
        SteeringError: the model at `path` cannot be loaded.
    """
    try:
        yield
    except _FAILURES as error:
        raise SteeringError(
            f"{path} cannot be loaded: {type(error).__name__}: {error}. Look whether all of its files are there and "
            "whole, and whether it fits into the device's memory (--device, --load-8bit, --load-4bit)."
        ) from error
