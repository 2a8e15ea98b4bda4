"""Keep the weights of a vision tower where LLaVA-NeXT would draw random ones.

LLaVA builds the tower of a checkpoint empty, and fills it from the tower's own files afterwards. LLaVA-NeXT fills it
first, because its own checkpoints hold trained towers; where one holds none, transformers then takes all of the tower's
weights for missing, and draws them at random. Whether a tower stays empty, LLaVA-NeXT decides by parts of names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llava_steering_plugin.foreign_files import INDEX_BYTES, pinned, read_json

_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS, _PICKLED = "model.safetensors", "pytorch_model.bin"
_PART = "vision_tower."

_own: ContextVar[bool] = ContextVar("own_towers", default=False)


@contextmanager
def own_towers() -> Iterator[None]:
    """Have the towers of checkpoints that hold none filled from their own files, for as long as the block runs."""
    token = _own.set(True)
    try:
        yield
    finally:
        _own.reset(token)


def stays_empty(settings: Any) -> bool:
    """Return whether the tower of a LLaVA is to be built empty, since its checkpoint has nothing to fill it with.

    Args:
        settings: what it is built from, the config of a checkpoint or the flags of a training.
    """
    from transformers import PretrainedConfig

    if not _own.get() or not isinstance(settings, PretrainedConfig):
        return False
    names = tensor_names(settings.name_or_path)
    return names is not None and not any(_PART in name for name in names)


def tensor_names(checkpoint: str) -> set[str] | None:
    """Return the names of a checkpoint's tensors; None if it has none that can be read.

    Args:
        checkpoint: a folder, or an id of the hub whose files are in the cache.
    """
    for name in (*_INDICES, _WEIGHTS, _PICKLED):
        file = _cached(checkpoint, name)
        if file is None:
            continue
        try:
            if name in _INDICES:
                return set(read_json(file, INDEX_BYTES)["weight_map"])
            with pinned(file) as pinned_file:
                if name == _WEIGHTS:
                    with safe_open(pinned_file, "pt") as tensors:
                        return set(tensors.keys())
                return set(torch.load(pinned_file, map_location="meta", weights_only=True))
        except (OSError, ValueError, LookupError, RuntimeError, UnpicklingError, SafetensorError):
            return None  # whoever loads it says what is wrong
    return None


def _cached(checkpoint: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if Path(checkpoint).is_dir():
        file = Path(checkpoint) / name
        return file if file.is_file() else None
    try:
        found = try_to_load_from_cache(checkpoint, name)
    except ValueError:
        return None
    return Path(found) if isinstance(found, str) else None
