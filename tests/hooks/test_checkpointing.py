"""Gradient checkpointing changes no gradient of a whole LLaVA, and a batch without images has gradients of zero."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_runs import MODES, RUNS, batch_of, gradients, one_step, train_setup, train_teardown
from steered import pictures, strengthen
from tiny_llava import HIDDEN

from llava_steering_plugin import attach, remove, token_map
from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.modes.mores import MoReS

pytest_plugins = ["steered_fixtures"]

Steered = Callable[..., Attachment]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("mode", sorted(MODES))
def test_gradient_checkpointing_gives_the_gradients_of_the_plain_run(
    model: Any, mode: str, run: Callable[[Any], None]
) -> None:
    strengthen(attach(model, mode, **MODES[mode]), size=0.05)
    plain = gradients(model, run, "off")
    for name, gradient in plain.items():
        # What a token of the prompt is behind the last layer reaches no other token.
        assert gradient.abs().max() > 1e-6 or ("steer_" in name and name.startswith("layers.3.")), name
    for checkpointing in ("reentrant", "not reentrant"):
        again = gradients(model, run, checkpointing)
        assert plain.keys() == again.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-6, msg=f"{checkpointing}: {name}")


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("mode", ["mixlora", "mores"])
def test_no_hook_on_the_embeddings_is_needed_for_that(
    model: Any, mode: str, run: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    strengthen(attach(model, mode, **MODES[mode]), size=0.05)
    hooked = gradients(model, run, "reentrant")
    monkeypatch.setattr(type(model), "enable_input_require_grads", lambda model: None)
    monkeypatch.setattr(type(model), "disable_input_require_grads", lambda model: None)
    bare = gradients(model, run, "reentrant")
    assert hooked.keys() == bare.keys()
    assert not [name for name, gradient in hooked.items() if not torch.equal(bare[name], gradient)]


def test_embeddings_of_the_callers_own_are_as_they_were(model: Any, steered: Steered) -> None:
    attachment = steered()
    embeddings = torch.randn(1, 6, HIDDEN)
    visual = torch.tensor([[False, True, True, False, False, False]])
    train_setup(model, "reentrant")
    model.disable_input_require_grads()
    try:
        with token_map(visual):
            loss = model(inputs_embeds=embeddings, labels=torch.full((1, 6), 7)).loss
        loss.backward()
    finally:
        model.gradient_checkpointing_disable()
    assert not embeddings.requires_grad
    assert embeddings.grad is None
    assert attachment.parameters()["layers.0.vis.steer_shift"].grad.any()


def test_the_plain_runs_gradients_are_those_of_the_formula(model: Any, frozen: Any, steered: Steered) -> None:
    attachment = steered(modality="vis")
    weights = attachment.parameters()["layers.0.vis.steer_shift"]
    plain = gradients(model, one_step, "off")["layers.0.vis.steer_shift"]
    # Central differences along the gradient itself.
    direction = plain / plain.norm()
    losses = []
    with torch.no_grad():
        for step in (1e-2, -1e-2):
            weights.add_(direction, alpha=step)
            losses.append(float(model(**batch_of(0)).loss))
            weights.sub_(direction, alpha=step)
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(plain.norm()), rel=0.05)


def test_removing_gives_the_models_own_checkpointing_back(model: Any, steered: Steered) -> None:
    model.gradient_checkpointing_enable()
    before = model.model._gradient_checkpointing_func
    try:
        steered()
        model(**batch_of(0))
        assert model.model._gradient_checkpointing_func is not before
        remove(model)
        assert model.model._gradient_checkpointing_func is before
    finally:
        model.gradient_checkpointing_disable()


@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "not reentrant"])
@pytest.mark.parametrize("modality", ["vis", "text", "vis+text"])
def test_text_only_batch_is_untouched_and_still_gives_every_parameter_a_gradient(
    model: Any, frozen: Any, steered: Steered, checkpointing: str, modality: str
) -> None:
    attachment = steered(modality=modality)
    batch = batch_of(0, text_only=True)
    with torch.no_grad():
        expected = frozen(**batch)
    train_setup(model, checkpointing)
    try:
        output = model(**batch)
        assert torch.equal(output.logits, expected.logits)
        output.loss.backward()
    finally:
        train_teardown(model)
    for name, parameter in attachment.parameters().items():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_train_and_leave_text_bit_identical(frozen: Any, dtype: torch.dtype) -> None:
    model = copy.deepcopy(frozen).to(dtype)
    plain = copy.deepcopy(model)
    attachment = strengthen(attach(model, MoReS(rank=4, tokens="all")))
    assert {parameter.dtype for parameter in attachment.parameters().values()} == {torch.float32}
    train_setup(model, "reentrant")
    batch = batch_of(1) | {"images": pictures(2).to(dtype)}
    output = model(**batch)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    with torch.no_grad():
        assert torch.equal(output.logits[1], plain(**batch).logits[1])
    for name, parameter in attachment.parameters().items():
        assert torch.isfinite(parameter.grad).all(), name
