"""Passes are described from the map of a `token_map` block, and refused where no map fits them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from steered import (
    PROMPT,
    TEXT,
    ByHand,
    ids_of,
    mask_of,
    pictures,
    strengthen,
    words,
)
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llava_steering_plugin import attach, token_map
from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.errors import TokenMapError
from llava_steering_plugin.hooks.passes import StackCall
from llava_steering_plugin.hooks.scope import current
from llava_steering_plugin.modes.mores import MoReS

pytest_plugins = ["steered_fixtures"]

Steered = Callable[..., Attachment]

# Models that are no LLaVA


def small_llama(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(5)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(
        LlamaConfig(**(sizes | {"num_attention_heads": 4, "initializer_range": 0.3} | settings))
    ).eval()


def test_a_token_map_steers_a_model_that_is_no_llava_also_through_generate() -> None:
    model = small_llama()
    plain = copy.deepcopy(model)
    attachment = strengthen(attach(model, MoReS(tokens="all")), size=1.0)
    embeds = torch.randn(2, 9, 32)
    visual = mask_of((2, 5, 2), (4, 3, 2))
    attention = torch.ones(2, 9).long()
    attention[1, :2] = 0
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "attention_mask": attention, "num_beams": 2}
    with ByHand(attachment).steering(plain, visual), torch.inference_mode():
        expected = plain(inputs_embeds=embeds, attention_mask=attention).logits
        beams = plain.generate(inputs_embeds=embeds, **options)
    with token_map(visual, attention), torch.inference_mode():
        logits = model(inputs_embeds=embeds, attention_mask=attention).logits
        assert torch.equal(model.generate(inputs_embeds=embeds, **options), beams)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(plain.generate(inputs_embeds=embeds, **options), beams)


def test_a_model_whose_layers_accelerate_has_offloaded_is_steered_where_it_computes() -> None:
    model, embeds, visual = small_llama(), torch.randn(1, 9, 32), mask_of((2, 5, 2))
    attachment = strengthen(attach(model, MoReS(tokens="all")), size=1.0)
    with token_map(visual), torch.inference_mode():
        expected = model(inputs_embeds=embeds).logits
    attachment.remove()
    cpu_offload(model)
    strengthen(attach(model, MoReS(tokens="all")), size=1.0)
    with token_map(visual), torch.inference_mode():
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, expected)


def test_a_model_that_is_no_llava_is_refused_without_a_map() -> None:
    model = small_llama()
    attach(model, "mores")
    for call in (
        lambda: model(input_ids=ids_of([1, 2, 3])),
        lambda: model(inputs_embeds=torch.randn(1, 3, 32)),
        lambda: model.generate(ids_of([1, 2, 3]), max_new_tokens=2),
    ):
        with pytest.raises(TokenMapError, match="token_map"):
            call()
    with pytest.raises(TokenMapError, match="called on its own"):
        model.model(input_ids=ids_of([1, 2, 3]))
    assert current() is None


# Maps that do not fit


def test_ready_made_embeddings_without_a_map_are_refused_with_what_to_do(model: Any, steered: Steered) -> None:
    steered()
    with pytest.raises(TokenMapError, match="Pass input_ids and images, or wrap the call"):
        model(inputs_embeds=torch.randn(1, 5, model.config.hidden_size))


@pytest.mark.parametrize("shape", [(1, 8), (2, 7), (4, 8)])
def test_a_map_of_another_shape_is_an_error_and_never_a_silent_skip(
    model: Any, steered: Steered, shape: tuple[int, int]
) -> None:
    steered()
    visual = torch.zeros(shape, dtype=torch.bool)
    with token_map(visual), pytest.raises(TokenMapError, match=r"describes \[\d, \d\] .* are \[2, 8\]"):
        model(inputs_embeds=torch.randn(2, 8, model.config.hidden_size))


def test_generated_rows_that_are_no_multiple_of_the_maps_are_refused() -> None:
    model = small_llama()
    attach(model, "mores")
    with token_map(torch.zeros(2, 4, dtype=torch.bool)), pytest.raises(TokenMapError, match="no multiple"):
        model.generate(inputs_embeds=torch.randn(3, 4, 32), max_new_tokens=2)


def test_a_prefill_in_chunks_is_refused(model: Any, steered: Steered) -> None:
    steered()
    cache = model(input_ids=ids_of(PROMPT), images=pictures(1), use_cache=True).past_key_values
    with pytest.raises(TokenMapError, match="chunked prefills"):
        model(input_ids=ids_of(words(3)), past_key_values=cache, attention_mask=torch.ones(1, len(TEXT) + 3))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"visual": torch.zeros(3)}, "one shape"),
        ({"visual": torch.zeros(1, 3), "attention": torch.ones(1, 4)}, "one shape"),
        ({"visual": torch.zeros(1, 3), "prompt": torch.ones(2, 3)}, "one shape|broadcast"),
        ({"visual": torch.ones(1, 3), "attention": torch.tensor([[1, 1, 0]])}, "padding"),
    ],
)
def test_bad_masks_are_refused_before_any_model_is_called(masks: dict[str, Tensor], message: str) -> None:
    with pytest.raises(TokenMapError, match=message), token_map(**masks):
        pass


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_known_by_either_of_its_names(name: str) -> None:
    cache = ((torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4)),)
    embeds = torch.zeros(1, 1, 8)
    assert StackCall.of({"inputs_embeds": embeds, name: cache}).cached == 5
    assert StackCall.of({"inputs_embeds": embeds, "past_key_values": None, "cache": None}).cached == 0
