"""Gradients of MixLoRA in a whole model: checkpointing, accumulation, GradScaler, half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from routed import LONG, SETTINGS, SHORT, adapted, batch, small_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from llava_steering_plugin import attach, remove, token_map
from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.modes.mixlora import MixLoRA


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return small_llama()


def loss_of(model: LlamaForCausalLM) -> Tensor:
    ids, attention = batch(SHORT + LONG, LONG, side="right")
    labels = ids.masked_fill(~attention.bool(), -100)
    labels[:, :4] = -100
    prompt = (labels != -100).cumsum(1) == 0
    with token_map(torch.zeros_like(prompt), attention, prompt):
        loss: Tensor = model(ids, attention_mask=attention, labels=labels).loss
    return loss


def gradients(attachment: Attachment, backward: Callable[[Any], None], reentrant: bool | None) -> dict[str, Tensor]:
    model: Any = attachment.model
    model.train().requires_grad_(False)
    for parameter in attachment.trained().values():
        parameter.requires_grad_(True)
    model.enable_input_require_grads()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(5)
    backward(model)
    found = {name: value.grad.clone() for name, value in attachment.trained().items() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    model.gradient_checkpointing_disable()
    model.disable_input_require_grads()
    return found


def one_step(model: Any) -> None:
    loss_of(model).backward()


def two_forwards_then_two_backwards(model: Any) -> None:
    losses = [loss_of(model), loss_of(model)]
    for loss in losses:
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backward", [one_step, two_forwards_then_two_backwards], ids=lambda run: run.__name__)
def test_gradient_checkpointing_gives_the_gradients_of_the_plain_run(
    base: LlamaForCausalLM, backward: Callable[[Any], None], reentrant: bool
) -> None:
    with adapted(base, dropout=0.1, noise=0.5, balance=0.5) as attachment:
        plain = gradients(attachment, backward, None)
        again = gradients(attachment, backward, reentrant)
    assert plain.keys() == attachment.parameters().keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


@pytest.mark.parametrize("reentrant", [None, True])
@pytest.mark.parametrize("scale", [1 / 4, 65536.0], ids=["accumulation", "GradScaler"])
def test_the_balance_loss_is_scaled_as_the_loss_is(
    base: LlamaForCausalLM, scale: float, reentrant: bool | None
) -> None:
    found = {}
    for balance in (0.0, 2.0):
        for factor in (1.0, scale):
            with adapted(base, balance=balance) as attachment:
                run = lambda model, factor=factor: (loss_of(model) * factor).backward()  # noqa: E731
                found[balance, factor] = gradients(attachment, run, reentrant)
    for name in found[0.0, 1.0]:
        once = found[2.0, 1.0][name] - found[0.0, 1.0][name]
        scaled = found[2.0, scale][name] - found[0.0, scale][name]
        torch.testing.assert_close(scaled / scale, once, atol=1e-5, rtol=1e-2, msg=name)
        assert bool(once.abs().max() > 0) == ("router_" in name), "it must reach all routers, and nothing else"


@pytest.mark.parametrize("reentrant", [None, True])
def test_the_balance_loss_survives_a_real_grad_scaler_and_a_real_accelerators_accumulation(
    base: LlamaForCausalLM, reentrant: bool | None
) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)

    def scaled(model: Any) -> None:
        # One each: a scaler knows optimizers by their address, which the next one may get again.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=1.0)
        scaler.scale(loss_of(model)).backward()
        scaler.unscale_(optimizer)

    def accumulated(model: Any) -> None:
        for _ in range(4):
            accelerator.backward(loss_of(model))

    found = {}
    try:
        for balance in (0.0, 100.0):
            for run in (one_step, scaled, accumulated):
                with adapted(base, balance=balance) as attachment:
                    found[balance, run] = gradients(attachment, run, reentrant)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    for run in (scaled, accumulated):
        for name, plain in found[100.0, one_step].items():
            torch.testing.assert_close(found[100.0, run][name], plain, atol=1e-5, rtol=1e-3, msg=name)
            own = plain - found[0.0, one_step][name]
            assert bool(own.abs().max() > 1e-3) == ("router_" in name), "a balance too small to see would show nothing"


def test_every_router_and_every_pool_gets_a_gradient_and_moves(base: LlamaForCausalLM) -> None:
    attachment = attach(base, MixLoRA(**SETTINGS))
    base.train()
    before = {name: value.detach().clone() for name, value in attachment.parameters().items()}
    # No weight decay: that moves parameters whose gradients are zeros, too.
    optimizer = torch.optim.AdamW(attachment.parameters().values(), lr=1e-2, weight_decay=0.0)
    reached: set[str] = set()
    for _ in range(3):
        loss_of(base).backward()
        reached |= {name for name, value in attachment.parameters().items() if bool(value.grad.any())}
        optimizer.step()
        optimizer.zero_grad()
    unmoved = [name for name, value in attachment.parameters().items() if torch.equal(value, before[name])]
    remove(base)
    base.eval()
    assert reached == before.keys()
    assert not unmoved


def test_with_frozen_routers_only_the_pools_move(base: LlamaForCausalLM) -> None:
    with adapted(base, router_grad="none") as attachment:
        found = gradients(attachment, one_step, True)
    assert set(found) == {name for name in attachment.parameters() if ".routed_" in name}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_model_trains_with_and_without_autocast(base: LlamaForCausalLM, dtype: torch.dtype) -> None:
    for whole in (False, True):
        model = LlamaForCausalLM(base.config)
        model.load_state_dict(base.state_dict())
        attachment = attach(model if whole else model.to(dtype), MixLoRA(**SETTINGS))
        with torch.autocast("cpu", dtype, enabled=whole):
            loss = loss_of(model.train())
        loss.backward()
        assert all(
            value.dtype == value.grad.dtype == torch.float32 and bool(value.grad.isfinite().all())
            for value in attachment.parameters().values()
        )
