"""A model that is its own decoder stack, without a language-model head, carries adapters too (`hooks/owner.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from routed import LONG, SHORT, batch, small_llama
from steered import strengthen
from torch import Tensor
from transformers import LlamaModel

from llava_steering_plugin import (
    AdapterPool,
    attach,
    disable_adapter,
    joint,
    load_adapter,
    remove_adapter,
    save_adapter,
    token_map,
)
from llava_steering_plugin.errors import TokenMapError
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS

MODES = [MoReS(rank=2, tokens="all"), MixLoRA(factors=8, rank=2)]
MODES.append(joint(*MODES))
IDS, ATTENTION = batch(SHORT, LONG)
VISUAL = ATTENTION.bool() & (torch.arange(IDS.shape[1]) < 7)


def states(model: LlamaModel, **how: object) -> Tensor:
    with token_map(VISUAL, ATTENTION):
        found: Tensor = model(IDS, attention_mask=ATTENTION, **how).last_hidden_state
    return found


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_it_is_tuned_saved_loaded_and_served_as_inside_its_whole_model(mode: Mode, tmp_path: Path) -> None:
    whole = small_llama()
    bare: LlamaModel = small_llama().model
    plain = states(bare)
    strengthen(attach(whole, mode))
    with token_map(VISUAL, ATTENTION):
        expected = whole(IDS, attention_mask=ATTENTION, output_hidden_states=True).hidden_states[-1]
    assert not torch.equal(expected, plain)

    strengthen(attach(bare, mode))
    assert torch.equal(states(bare), expected)
    with disable_adapter(bare):
        assert torch.equal(states(bare), plain)
    with pytest.raises(TokenMapError, match="which positions are visual"):
        bare(IDS)
    save_adapter(bare, tmp_path / "bare")
    remove_adapter(bare)
    assert torch.equal(states(bare), plain)

    load_adapter(bare, tmp_path / "bare")
    assert torch.equal(states(bare), expected)
    remove_adapter(bare)
    save_adapter(whole, tmp_path / "whole")
    pool = AdapterPool(bare)
    pool.load("one", tmp_path / "whole")
    assert torch.equal(states(bare, adapter_names="one"), expected)
    assert torch.equal(states(bare), plain)
    mixed = states(bare, adapter_names=["one", "__base__"])
    torch.testing.assert_close(mixed[0], expected[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(mixed[1], plain[1])


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_it_trains_with_and_without_checkpointing(reentrant: bool | None) -> None:
    found = []
    for how in (None, reentrant):
        bare: LlamaModel = small_llama().model.requires_grad_(False).train()
        attachment = strengthen(attach(bare, MixLoRA(factors=8, rank=2)))
        if how is not None:
            bare.gradient_checkpointing_enable({"use_reentrant": how})
            bare.enable_input_require_grads()
        states(bare).sin().sum().backward()
        found.append({name: parameter.grad for name, parameter in attachment.parameters().items()})
        remove_adapter(bare)
        assert not bare.__dict__.get("_gradient_checkpointing_func") or "bound" not in repr(
            bare.__dict__["_gradient_checkpointing_func"]
        )
    for name, gradient in found[0].items():
        assert gradient is not None and gradient.any() and torch.equal(gradient, found[1][name])
