"""Puts plain linears where a loader has quantised ones that an adapter brings weights for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn


def unquantise(root: nn.Module, tensors: Iterable[str], dtype: torch.dtype) -> dict[str, nn.Module]:
    """Put plain linears below `root` where a loader has quantised ones that the adapter brings weights for.

    LLaVA's 4-bit loader quantises the projector too; the trained projector cannot be copied into packed weights.

    Args:
        tensors: names of the weights, below `root`.
        dtype: of the plain linears.

    Returns:
        The quantised linears by their names below `root`: `put_back` undoes the exchange.
    """
    plain: dict[str, nn.Module] = {}
    quantised: dict[str, nn.Module] = {}
    for name in tensors:
        path, _, leaf = name.rpartition(".")
        host = root.get_submodule(path)
        if leaf != "weight" or type(host) is nn.Linear or not isinstance(host, nn.Linear):
            continue
        linear = nn.Linear(host.in_features, host.out_features, host.bias is not None, dtype=dtype)
        plain[path], quantised[path] = linear.requires_grad_(False).to(host.weight.device), host
    put_back(root, plain)
    return quantised


def put_back(root: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Set modules at their paths below `root`."""
    for path, module in modules.items():
        parent, _, child = path.rpartition(".")
        setattr(root.get_submodule(parent), child, module)
