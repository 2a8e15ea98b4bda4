"""Collect the factors that MixLoRA's routers choose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llava_steering_plugin.modes.base import ForwardPass
from llava_steering_plugin.modes.mixlora import RoutedLinear


@contextmanager
def choices(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect the choices of the last prefill by router: bool [rows, E], True for a chosen factor."""
    chosen: dict[str, Tensor] = {}

    def note(module: RoutedLinear, args: tuple[Tensor, Tensor, ForwardPass], output: Tensor, path: str) -> None:
        kept = args[2].kept[module]
        for side, factors in (("a", kept.a), ("b", kept.b)):
            none = torch.zeros(len(factors), module.mode.factors, dtype=torch.bool, device=factors.device)
            chosen[f"{path}.{side}"] = none.scatter(1, factors, True)

    handles = [
        module.register_forward_hook(lambda module, args, output, path=path: note(module, args, output, path))
        for path, module in modules.items()
    ]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()
