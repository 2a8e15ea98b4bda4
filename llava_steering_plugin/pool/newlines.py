"""Adapters that bring their own image_newline: in every row, the lines of tiles end as the row's adapter learned it.

LLaVA reads the one parameter while it lays out all rows. Here it reads a mark instead, and each row's own takes its
place afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava_steering_plugin.hooks.look_alike import look_alike
from llava_steering_plugin.pool.adapter import PooledAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# No image feature has this value in all of its dimensions.
MARK = 12345.0


def marking(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Return a model that ends lines with the mark and is `model` otherwise."""
    return look_alike(model, {name: torch.full_like(model.get_parameter(name), MARK, requires_grad=False)})


def with_newlines(embeds: Tensor, base: Tensor, adapters: Sequence[PooledAdapter | None]) -> Tensor:
    """Replace the marks in `embeds` [rows, positions, features] by what each row ends its lines with.

    Args:
        base: the base's own.
        adapters: one for each row, or one for all; None is the base.
    """
    mark = torch.full_like(base, MARK).to(embeds.device, embeds.dtype)
    marked = (embeds == mark).all(-1, keepdim=True)
    own = [base if adapter is None or adapter.newline is None else adapter.newline for adapter in adapters]
    # In the dtype of the base's first, in which LLaVA would have read it.
    values = torch.stack([value.to(base.device, base.dtype) for value in own]).to(embeds.device, embeds.dtype)
    return torch.where(marked, values.unsqueeze(1), embeds)
