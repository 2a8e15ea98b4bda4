"""Counts of parameters, and the table that shows them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llava_steering_plugin import MoReS, attach
from llava_steering_plugin.adapters.counts import LORA_RANKS, ParameterCounts, lora_parameters, numel, parameter_table

WIDTH, INNER, LAYERS, RANK = 8, 12, 2, 3


@pytest.fixture
def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))


def test_an_attachment_counts_itself_the_model_and_what_lora_would_train(model: LlamaForCausalLM) -> None:
    before = sum(value.numel() for value in model.parameters())
    attachment = attach(model, MoReS(rank=RANK, tokens="all"))
    model.requires_grad_(False)
    for parameter in attachment.parameters().values():
        parameter.requires_grad_(True)
    counts = attachment.summary()
    assert counts.mode == LAYERS * (2 * RANK * WIDTH + RANK)
    assert (counts.other, counts.trainable, counts.model) == (0, counts.mode, before)
    linears = 4 * (WIDTH + WIDTH) + 3 * (WIDTH + INNER)
    assert counts.lora == {rank: rank * LAYERS * linears for rank in LORA_RANKS}
    assert lora_parameters(attachment.shape, 1) == LAYERS * linears
    assert counts.percent == pytest.approx(100 * counts.mode / (before + counts.mode))
    assert str(counts).startswith(f"{counts.mode:,} trainable parameters in the adapter and 0 in the model")


def test_shared_parameters_count_once_and_packed_ones_as_what_they_hold() -> None:
    class Packed(nn.Linear):
        """Holds two values in one, as 4-bit linears do."""

        def __init__(self) -> None:
            super().__init__(6, 4)
            self.weight = nn.Parameter(self.weight.reshape(-1, 1)[::2].clone())

    packed, shared = Packed(), nn.Linear(4, 6)
    assert numel(nn.ModuleList([packed, shared, shared])) == (24 + 4) + (24 + 6)


def test_the_table_says_where_a_number_is_unknown() -> None:
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(parameter_table("mores", ParameterCounts(2_000, None, 10_000, {8: 500})))
    lines = console.export_text().splitlines()
    assert any("mores" in line and "2,000" in line and "20.0000 %" in line for line in lines)
    assert any("projector" in line and "unknown" in line for line in lines)
    assert any("LoRA r=8" in line and "5.0000 %" in line for line in lines)
