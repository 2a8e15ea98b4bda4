"""Keep a mode in the dtype it chooses, whatever its model does: torch's default, autocast, the range of values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def largest_in(dtype: torch.dtype) -> float:
    """Return the size that a hidden state may have in a model that computes in `dtype`: norms square it in float32."""
    return min(torch.finfo(dtype).max, math.sqrt(torch.finfo(torch.float32).max))


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off for a block: an adapter computes in the dtype it chooses, whatever the backbone runs in.

    Where it is off already, nothing is done: to switch it takes longer than a decode step of a small linear.
    """
    if not autocast_is_on(device.type):
        return nullcontext()
    try:
        return torch.autocast(device_type=device.type, enabled=False)
    except RuntimeError:
        # A device without an autocast of its own: torch refuses its name. Meta, on which plans are made; MPS before
        # torch 2.5.
        return torch.autocast(device_type="cpu", enabled=False)


def autocast_is_on(device_type: str) -> bool:
    """Say whether autocast is on for a type of device; True where torch cannot tell."""
    try:
        return torch.is_autocast_enabled(device_type)
    except TypeError:  # torch < 2.4 has a function for each type
        known = {"cpu": torch.is_autocast_cpu_enabled, "cuda": torch.is_autocast_enabled}
        return bool(known.get(device_type, lambda: True)())
    except RuntimeError:
        return True


@contextmanager
def default_dtype(dtype: torch.dtype | None = None) -> Iterator[None]:
    """Make `dtype` torch's default for the block, and put back the one before, however the block ends.

    transformers 4.37 leaves float16 behind where `from_pretrained` fails.

    Args:
        dtype: the default in the block; None: the one that is there.
    """
    before = torch.get_default_dtype()
    # Written only where it differs: the default is shared by all threads.
    if dtype not in (None, before):
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        if torch.get_default_dtype() != before:
            torch.set_default_dtype(before)


def has_float64(device: torch.device) -> bool:
    """Say whether `device` computes in float64, which Apple's GPUs do not."""
    return device.type != "mps"
