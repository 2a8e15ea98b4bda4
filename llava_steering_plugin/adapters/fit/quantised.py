"""Puts plain linears where a loader has quantised ones that an adapter brings weights for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeGuard

import torch
from torch import nn


def quantised_linears(root: nn.Module, tensors: Iterable[str]) -> dict[str, nn.Linear]:
    """Return the quantised linears that an adapter brings weights for, by their names below `root`.

    Args:
        tensors: names of the weights, below `root`.
    """
    paths = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    hosts = {path: root.get_submodule(path) for path in paths}
    return {path: host for path, host in hosts.items() if is_quantised(host)}


def is_quantised(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Tell whether a module is a linear whose weights are packed: those are subclasses of nn.Linear."""
    return isinstance(module, nn.Linear) and type(module) is not nn.Linear


def unquantise(root: nn.Module, tensors: Iterable[str], dtype: torch.dtype) -> None:
    """Put plain linears in the places of `quantised_linears`.

    LLaVA's 4-bit loader quantises the projector too; the trained projector cannot be copied into packed weights.

    Args:
        dtype: of the plain linears.
    """
    plain = {}
    for path, host in quantised_linears(root, tensors).items():
        linear = nn.Linear(host.in_features, host.out_features, host.bias is not None, dtype=dtype)
        plain[path] = linear.requires_grad_(False).to(host.weight.device)
    put_back(root, plain)


def put_back(root: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Set modules at their paths below `root`."""
    for path, module in modules.items():
        parent, _, child = path.rpartition(".")
        setattr(root.get_submodule(parent), child, module)
