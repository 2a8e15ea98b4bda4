"""Puts plain linears where a loader has quantised ones that an adapter brings weights for."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def unquantise(root: nn.Module, tensors: Iterable[str], dtype: torch.dtype) -> None:
    """Puts plain linears below `root` where a loader has quantised ones that the adapter brings weights for.

    LLaVA's 4-bit loader quantises the projector too; the trained projector cannot be copied into packed weights.

    Args:
        tensors: names of the weights, below `root`.
        dtype: of the plain linears.
    """
    for name in tensors:
        path, _, leaf = name.rpartition(".")
        host = root.get_submodule(path)
        if leaf != "weight" or type(host) is nn.Linear or not isinstance(host, nn.Linear):
            continue
        plain = nn.Linear(host.in_features, host.out_features, host.bias is not None, dtype=dtype)
        plain.requires_grad_(False)
        parent, _, child = path.rpartition(".")
        setattr(root.get_submodule(parent), child, plain.to(host.weight.device))
