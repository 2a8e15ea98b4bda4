"""Other code may put a `forward` of its own on a model that carries an adapter: trainers and accelerate do.

Covers the hooks by which `hooks/owner.py` opens the scope of a call then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from routed import LONG, SHORT, batch, small_llama
from steered import strengthen
from torch import Tensor
from transformers import LlamaForCausalLM

from llava_steering_plugin import AdapterPool, attach, disable_adapter, remove_adapter, save_adapter, token_map
from llava_steering_plugin.errors import SteeringError, TokenMapError
from llava_steering_plugin.hooks.scope import current
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS

MODES: list[Mode] = [MoReS(rank=2, tokens="all"), MixLoRA(factors=8, rank=2, balance=0.3)]
IDS, ATTENTION = batch(SHORT, LONG)
VISUAL = ATTENTION.bool() & (torch.arange(IDS.shape[1]) < 7)
LABELS = IDS.masked_fill(torch.arange(IDS.shape[1]) < 7, -100)


def fused(model: Any) -> Callable[..., Any]:
    """A forward as TRL's: the decoder and the head by themselves, the original one never."""

    def forward(input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **rest: Any) -> Any:
        logits = model.lm_head(model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state)
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)

    return forward


def wrapped(model: Any) -> Callable[..., Any]:
    """A forward as accelerate's: something around the one that is there."""
    original = model.forward
    return lambda *args, **kwargs: original(*args, **kwargs)


def trained(forward: Callable[[Any], Callable[..., Any]] | None, mode: Mode, how: bool | None) -> list[Tensor]:
    """The loss of a step and its gradients; `how` is whether checkpointing is reentrant, None without it."""
    model = small_llama().requires_grad_(False).train()
    attachment = strengthen(attach(model, mode), size=0.1)
    if forward is not None:
        model.forward = forward(model)
    if how is not None:
        model.gradient_checkpointing_enable({"use_reentrant": how})
    prompt = ATTENTION.bool() & (LABELS == -100)
    with token_map(VISUAL, ATTENTION, prompt):
        loss = model(IDS, attention_mask=ATTENTION, labels=LABELS).loss
    assert current() is None
    (loss * 3).backward()
    gradients = [parameter.grad for parameter in attachment.trained().values()]
    assert all(gradient is not None for gradient in gradients)
    return [loss.detach(), *gradients]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("how", [None, True, False])
@pytest.mark.parametrize("forward", [fused, wrapped])
def test_a_training_step_is_the_one_with_the_models_own_forward(
    forward: Callable[[Any], Callable[..., Any]], how: bool | None, mode: Mode
) -> None:
    expected = trained(None, mode, how)
    for value, wanted in zip(trained(forward, mode, how), expected, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-6, rtol=1e-5)
    assert any(bool(value.any()) for value in expected[1:])


@pytest.mark.parametrize("forward", [fused, wrapped])
def test_disabled_blocks_pools_and_generations_know_their_rows(
    forward: Callable[[Any], Callable[..., Any]], tmp_path: Path
) -> None:
    model = small_llama()
    call = {"input_ids": IDS, "attention_mask": ATTENTION}
    plain = model(**call).logits
    strengthen(attach(model, MODES[0]))
    with token_map(VISUAL, ATTENTION):
        expected = model(**call).logits
        answer = model.generate(IDS, attention_mask=ATTENTION, max_new_tokens=3, do_sample=False)
    save_adapter(model, tmp_path)
    model.forward = forward(model)
    with disable_adapter(model):
        assert torch.equal(model(**call).logits, plain)
    with token_map(VISUAL, ATTENTION):
        assert torch.equal(model(**call).logits, expected)
        if forward is wrapped:
            again = model.generate(IDS, attention_mask=ATTENTION, max_new_tokens=3, do_sample=False)
            assert torch.equal(again, answer)
    remove_adapter(model)
    assert torch.equal(model(**call).logits, plain)

    model = small_llama()
    pool = AdapterPool(model)
    pool.load("one", tmp_path)
    model.forward = forward(model)
    with token_map(VISUAL, ATTENTION):
        mixed = model(**call, adapter_names=["one", "__base__"]).logits
    torch.testing.assert_close(mixed[0], expected[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(mixed[1], plain[1])
    pool.remove()


def test_a_forward_that_fails_leaves_no_scope_and_no_adapter_in_use(tmp_path: Path) -> None:
    model = small_llama()
    strengthen(attach(model, MODES[0]))
    save_adapter(model, tmp_path)
    remove_adapter(model)
    pool = AdapterPool(model)
    pool.load("one", tmp_path)

    def failing(*args: Any, **kwargs: Any) -> Any:
        assert current() is not None
        raise ValueError("on purpose")

    model.forward = failing
    for _ in range(2):
        with pytest.raises(ValueError, match="on purpose"):
            model(IDS, adapter_names="one")
        assert current() is None
    model.forward = fused(model)
    with pytest.raises(TokenMapError, match="unknown which positions are visual"):
        model(IDS, ATTENTION, adapter_names="one")
    assert current() is None
    pool.remove()


def test_threads_see_only_their_own_maps() -> None:
    model = small_llama()
    strengthen(attach(model, MODES[0]))
    model.forward = fused(model)
    maps = [VISUAL, torch.zeros_like(VISUAL)]
    expected, found = [], [list[Tensor]() for _ in maps]

    def answer(visual: Tensor) -> Tensor:
        with torch.no_grad(), token_map(visual, ATTENTION):
            logits: Tensor = model(IDS, attention_mask=ATTENTION).logits
            return logits

    for visual in maps:
        expected.append(answer(visual))
    assert not torch.equal(*expected)

    def run(number: int) -> None:
        found[number].extend(answer(maps[number]) for _ in range(30))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for wanted, answers in zip(expected, found, strict=True):
        assert len(answers) == 30 and all(torch.equal(each, wanted) for each in answers)


def test_hooks_that_come_before_and_after_change_nothing() -> None:
    model = small_llama()
    seen: list[str] = []
    model.register_forward_pre_hook(lambda *_: seen.append("first"))
    strengthen(attach(model, MODES[0]))
    model.register_forward_hook(lambda *_: seen.append("last"))
    call = {"input_ids": IDS, "attention_mask": ATTENTION}
    with token_map(VISUAL, ATTENTION):
        expected = model(**call).logits
        model.forward = fused(model)
        assert torch.equal(model(**call).logits, expected)
    assert seen == ["first", "last"] * 2 and current() is None


def test_a_base_with_parts_of_its_own_cannot_answer_through_anothers_forward() -> None:
    model: LlamaForCausalLM = small_llama()
    attachment = strengthen(attach(model, MODES[0]))
    attachment.original.set_config({"max_length": 7})
    model.forward = fused(model)
    with pytest.raises(SteeringError, match="forward of this LlamaForCausalLM was replaced"), disable_adapter(model):
        model(IDS, attention_mask=ATTENTION)
    assert current() is None
