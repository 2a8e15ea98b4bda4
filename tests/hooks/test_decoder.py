"""The decoder stack is found by its structure, in any causal model of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.hooks.decoder import find_decoder

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def test_layers_and_linears_of_a_llama_are_listed_with_their_widths() -> None:
    model = llama()
    stack, shape = find_decoder(model)
    assert stack is model.model
    assert shape.hidden_size == 32
    assert [layer.path for layer in shape.layers] == ["layers.0", "layers.1", "layers.2"]
    linears = shape.layers[1].linears
    assert linears["layers.1.self_attn.k_proj"] == (32, 16)
    assert linears["layers.1.mlp.down_proj"] == (48, 32)
    assert len(linears) == 7 and all(isinstance(stack.get_submodule(path), nn.Linear) for path in linears)


def test_a_model_with_other_names_is_found_by_its_structure() -> None:
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))
    stack, shape = find_decoder(model)
    assert stack is model.gpt_neox
    assert len(shape.layers) == 3
    assert shape.layers[0].linears["layers.0.attention.query_key_value"] == (32, 96)


def test_a_model_on_the_meta_device_is_enough() -> None:
    with torch.device("meta"):
        model = llama()
    assert find_decoder(model)[1] == find_decoder(llama())[1]


def test_a_deeper_list_of_the_same_length_is_not_mistaken_for_the_layers() -> None:
    model = llama()
    model.model.layers[0].experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    assert [layer.path for layer in find_decoder(model)[1].layers] == ["layers.0", "layers.1", "layers.2"]


def test_without_a_list_of_layers_or_with_two_the_error_says_what_was_found() -> None:
    model = llama()
    model.config.num_hidden_layers = 4
    with pytest.raises(SteeringError, match=r"LlamaForCausalLM: expected one list of 4 .* LlamaModel, found none"):
        find_decoder(model)
    model = llama()
    model.model.others = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    with pytest.raises(SteeringError, match=r"found layers, others"):
        find_decoder(model)
