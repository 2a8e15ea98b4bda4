"""Adapters for the tests of vLLM that bring linears of the projector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from steered import strengthen
from vllm_fixtures import Reference

from llava_steering_plugin import attach, remove_adapter, save_adapter
from llava_steering_plugin.modes.mores import MoReS


def save_with_projector(
    reference: Reference, seed: int, folder: Path, linears: Sequence[str] = ("linear_1", "linear_2")
) -> Path:
    """An adapter whose steering is always the same, with linears of the projector that depend on the seed."""
    model, mode = reference.model, MoReS(rank=2, tokens="f4+l5")
    names = [f"model.multi_modal_projector.{linear}.{leaf}" for linear in linears for leaf in ("weight", "bias")]
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in before.items():
            change = torch.randn(value.shape, generator=generator)
            model.get_parameter(name).add_(change * (value.std() if value.dim() > 1 else 0.1))
    attachment = strengthen(attach(model, mode), 0, 0.5)
    attachment.extras |= set(names)
    try:
        save_adapter(model, folder)
    finally:
        remove_adapter(model)
        with torch.no_grad():
            for name, value in before.items():
                model.get_parameter(name).copy_(value)
    return folder
