"""Build frozen Llama models with real layer shapes and random weights, in memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

Model = TypeVar("Model", bound=nn.Module)
VOCABULARY = 512  # small, so that the head does not hide the cost of the layers


@dataclass(frozen=True)
class Case:
    """One model and one batch: `visual` tokens first, then `text` tokens, in every row."""

    width: int
    intermediate: int
    heads: int
    layers: int
    batch: int
    visual: int
    text: int

    @property
    def positions(self) -> int:
        return self.visual + self.text

    def __str__(self) -> str:
        return f"width {self.width}, {self.layers} layers, batch {self.batch}, {self.visual} + {self.text} tokens"


def frozen_llama(case: Case, dtype: torch.dtype, **settings: Any) -> LlamaForCausalLM:
    """Return a Llama of the case's shapes with the same random weights every time.

    Args:
        settings: further values of its configuration.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.width,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        **settings,
    )
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def clone(model: Model) -> Model:
    """Return another model over the same weights in memory, for another adapter."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def random_embeds(case: Case, dtype: torch.dtype) -> Tensor:
    """Return random input embeddings [batch, positions, width]."""
    return torch.randn(case.batch, case.positions, case.width).to(dtype)


def visual_mask(case: Case) -> Tensor:
    """Return bool [batch, positions]: True for visual tokens."""
    visual = torch.zeros(case.batch, case.positions, dtype=torch.bool)
    visual[:, : case.visual] = True
    return visual
