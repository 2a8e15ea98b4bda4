"""An owner describes every pass of its model, notes the loss's gradient, and gives the model back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llava_steering_plugin import token_map
from llava_steering_plugin.errors import SteeringError, TokenMapError
from llava_steering_plugin.hooks.owner import ModelOwner, owner_of
from llava_steering_plugin.hooks.scope import Scope, current, without
from llava_steering_plugin.modes.base import ForwardPass


class Notes(ModelOwner):
    """Notes the passes that it enters."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__(model)
        self.entered: list[ForwardPass] = []
        self.take()

    def _enter_pass(self, scope: Scope, this_pass: ForwardPass) -> None:
        super()._enter_pass(scope, this_pass)
        assert current() is scope and scope.owner is self
        self.entered.append(this_pass)


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, eos_token_id=None)).eval()


@pytest.fixture
def owner() -> Iterator[Notes]:
    owner = Notes(small_llama())
    yield owner
    if owner_of(owner.model) is owner:
        owner.remove()


VISUAL = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]]).bool()
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def test_a_generation_is_a_prefill_described_by_the_map_and_decode_steps_that_share_what_it_keeps(
    owner: Notes,
) -> None:
    with token_map(VISUAL):
        owner.model.generate(IDS, max_new_tokens=4, do_sample=False)
    prefill, *steps = owner.entered
    assert torch.equal(prefill.visual, VISUAL) and torch.equal(prefill.text, ~VISUAL) and not prefill.decode
    assert len(steps) == 3
    for step in steps:
        assert step.decode and step.visual.shape == (2, 1)
        assert not step.visual.any() and step.text.all() and not step.prompt.any()
        assert step.kept is prefill.kept


def test_every_forward_has_things_of_its_own(owner: Notes) -> None:
    with token_map(VISUAL):
        owner.model(IDS)
        owner.model(IDS)
    first, second = owner.entered
    assert first.kept is not second.kept and first.loss_gradient is not second.loss_gradient


def test_a_disabled_owner_describes_nothing_and_needs_no_map(owner: Notes) -> None:
    expected = small_llama()(IDS).logits
    with without(owner):
        assert torch.equal(owner.model(IDS).logits, expected)
    assert owner.entered == []
    with pytest.raises(TokenMapError, match="unknown which positions are visual"):
        owner.model(IDS)


@pytest.mark.parametrize("scale", [1.0, 0.25, 1024.0])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_the_losss_gradient_is_known_in_its_backward_pass_and_one_before(
    owner: Notes, scale: float, as_tuple: bool
) -> None:
    seen: list[Tensor | float] = []
    with token_map(VISUAL):
        result = owner.model(IDS, labels=IDS, output_hidden_states=True, return_dict=not as_tuple)
    (this_pass,) = owner.entered
    assert this_pass.loss_scale() == 1.0
    hidden = result[-1][1] if as_tuple else result.hidden_states[1]
    hidden.register_hook(lambda gradient: seen.append(this_pass.loss_scale()))
    (result[0] * scale).backward()
    assert [float(value) for value in seen] == [scale]


def test_a_model_has_one_owner_and_is_given_back_as_it_was(owner: Notes) -> None:
    model = owner.model
    assert owner_of(model) is owner
    with pytest.raises(SteeringError, match="carries an adapter already"):
        Notes(model)
    owner.remove()
    assert owner_of(model) is None
    assert model.__dict__.keys() == small_llama().__dict__.keys()
    assert not model.model._forward_pre_hooks
    assert torch.equal(model(IDS).logits, small_llama()(IDS).logits)


def test_a_stack_that_is_called_on_its_own_is_refused(owner: Notes) -> None:
    with pytest.raises(TokenMapError, match="LlamaModel was called on its own"):
        owner.model.model(IDS)
