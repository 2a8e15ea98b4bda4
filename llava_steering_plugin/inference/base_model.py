"""Loads the base of chat, worker and eval through upstream's loader, and explains its failures in one message."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError

from llava_steering_plugin.adapters.fit.base_model import read_config
from llava_steering_plugin.adapters.stored.folder import StoredAdapter
from llava_steering_plugin.adapters.stored.locate import find
from llava_steering_plugin.errors import ArgumentsError, SteeringError, UpstreamError
from llava_steering_plugin.foreign_files import check_folder
from llava_steering_plugin.inference.base_files import is_llava, no_llava
from llava_steering_plugin.modes.base import default_dtype
from llava_steering_plugin.pool.pool import AdapterPool
from llava_steering_plugin.upstream.model.image_layouts import unknown_layout
from llava_steering_plugin.upstream.model.loading import name_for
from llava_steering_plugin.upstream.model.towers import own_towers

# What upstream, transformers and torch raise for a base that is damaged, unknown to them or too large.
_FAILURES = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    ImportError,
    RuntimeError,
    MemoryError,
    AssertionError,
    SafetensorError,
)


@dataclass(frozen=True)
class LoadedBase:
    """A base model that can answer.

    Attributes:
        pool: holds the adapters on the model.
        processor: the image processor; None if the model takes no images.
    """

    pool: AdapterPool
    tokenizer: Any
    processor: Any


def read_base_config(path: str, hint: str = "") -> dict[str, Any]:
    """Return the config.json of the model at `path`, a folder or a hub id.

    Args:
        hint: advice for the error message, with a leading space.

    Raises:
        ArgumentsError: an adapter is there: its folder holds the config.json of its base.
        UpstreamError: there is none, or it describes no model.
    """
    if find(path) is not None:
        raise ArgumentsError(f"{path} is an adapter, no base.{hint or ' Give the base that it was trained on.'}")
    try:
        return read_config(path)
    except SteeringError as error:
        raise UpstreamError(f"{path} is no model that can be loaded: {error}{hint}") from error


def loading_name(path: str, config: Mapping[str, Any]) -> str:
    """Return a name for which upstream's rules load the model as its config.json describes it.

    Upstream takes a model for a plain language model unless its name says otherwise.
    """
    if is_llava(config):
        return name_for(config["model_type"])
    from llava.mm_utils import get_model_name_from_path

    return str(get_model_name_from_path(path))


def load_base(
    path: str,
    *,
    device: str,
    load_4bit: bool = False,
    load_8bit: bool = False,
    max_resident: int | None = None,
    only_llava: bool = False,
) -> LoadedBase:
    """Load the base at `path`, a folder or a hub id, with an empty pool on it.

    Args:
        max_resident: as in `AdapterPool`.
        only_llava: refuse a plain language model.

    Raises:
        ArgumentsError: `only_llava`, and the model has no vision tower.
        UpstreamError: there is no model at `path`.
        SteeringError: it cannot be loaded, or this LLaVA does not cut pictures as its config.json says.
    """
    config = read_base_config(path, " Give the base that the adapters were trained on." if only_llava else "")
    if only_llava and not is_llava(config):
        raise no_llava(path, config)
    check_folder(path, "the base")
    if isinstance(tower := config.get("mm_vision_tower"), str):
        check_folder(tower, "the vision tower")
    if reason := unknown_layout(config):
        raise SteeringError(f"{path} would get other pictures here than in its training: {reason}.")
    how = {"device": device, "load_4bit": load_4bit, "load_8bit": load_8bit}
    tokenizer, model, processor = load_with_upstream(path, None, loading_name(path, config), how)
    return LoadedBase(AdapterPool(model, tokenizer, max_resident=max_resident), tokenizer, processor)


def load_with_upstream(
    path: str | StoredAdapter, base: str | None, name: str, how: Mapping[str, Any]
) -> tuple[Any, Any, Any]:
    """Return tokenizer, model and image processor from LLaVA's `load_pretrained_model`.

    Args:
        path: a model, folder or hub id, or an adapter that has been read.
        base: where the base of the adapter is, if not where the adapter says.
        name: the name by which upstream decides what to load.
        how: further arguments of `load_pretrained_model`.

    Raises:
        SteeringError: the model cannot be loaded.
    """
    from llava.model.builder import load_pretrained_model

    failures = explained_failures(path.folder if isinstance(path, StoredAdapter) else path)
    with failures, default_dtype(), own_towers():
        tokenizer, model, processor, _ = load_pretrained_model(path, base, name, **how)
    return tokenizer, model, processor


@contextmanager
def explained_failures(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever upstream's loader raises inside the block into one message.

    Raises:
        SteeringError: the model at `path` cannot be loaded.
    """
    try:
        yield
    except _FAILURES as error:
        raise SteeringError(
            f"{path} cannot be loaded: {type(error).__name__}: {error}. Check that all of its files are there and "
            "complete, and that it fits into the device's memory (--device, --load-8bit, --load-4bit)."
        ) from error


def skip_random_weights() -> None:
    """Make this process build linear layers and norms without random weights, as LLaVA's programs do to load faster."""
    from llava.utils import disable_torch_init

    disable_torch_init()
