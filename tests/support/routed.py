"""MixLoRA far from the identity, on one linear and on a small Llama, and batches of unequal rows for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from steered import away_from_identity
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llava_steering_plugin import attach
from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.modes.base import ForwardPass
from llava_steering_plugin.modes.mixlora import MixLoRA, RoutedLinear

SMALL = {"factors": 6, "rank": 3}
SETTINGS: dict[str, Any] = {"factors": 8, "rank": 2}
SHORT, LONG = [5, 9, 23, 41], [7, 7, 30, 12, 50, 44, 3, 28, 19]


def small_llama() -> LlamaForCausalLM:
    """Two layers of width 32, the same weights every time, in eval mode."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        attention_dropout=0.0,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@contextmanager
def adapted(base: LlamaForCausalLM, **settings: Any) -> Iterator[Attachment]:
    attachment = attach(base, MixLoRA(**{**SETTINGS, **settings}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in attachment.parameters().items():
            size = 0.1 if name.rpartition(".")[2].startswith("routed") else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    try:
        yield attachment
    finally:
        attachment.remove()
        base.eval()
        base.zero_grad(set_to_none=True)


def batch(*rows: list[int], side: str = "left") -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, padded on one side."""
    longest = max(map(len, rows))
    ids, attention = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[number, place], attention[number, place] = torch.tensor(row), 1
    return ids, attention


def a_pass(prompt: Tensor, *, decode: bool = False) -> ForwardPass:
    return ForwardPass(torch.zeros_like(prompt), torch.ones_like(prompt), prompt, decode, {})


def everything(rows: int, positions: int) -> ForwardPass:
    return a_pass(torch.ones(rows, positions, dtype=torch.bool))


def routed(mode: MixLoRA, in_features: int = 12, out_features: int = 10, balance: float = 0.0) -> RoutedLinear:
    """Far from the identity, and with routers that are sure of themselves."""
    module = RoutedLinear(in_features, out_features, mode, balance)
    away_from_identity(module)
    return module
