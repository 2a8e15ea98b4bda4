from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from steered import (
    IMAGE,
    PROMPT,
    generate,
    ids_of,
    pictures,
    strengthen,
    words,
)
from torch import Tensor

from llava_steering_plugin import attach, disabled, remove
from llava_steering_plugin.adapters.attach import Attachment
from llava_steering_plugin.modes.mores import MoReS

pytest_plugins = ["steered_fixtures"]

Steered = Callable[..., Attachment]


def train_setup(model: Any, checkpointing: str) -> None:
    model.train()
    model.requires_grad_(False)
    for parameter in model.llava_steering.parameters().values():
        parameter.requires_grad_(True)
    if checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()


def train_teardown(model: Any) -> None:
    if model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()


def batch_of(seed: int, *, text_only: bool = False) -> dict[str, Any]:
    """Two rows of different lengths, the image of each elsewhere; the second has none for odd seeds."""
    rows = [
        [1, *words(2, seed), IMAGE, *words(5, seed + 1)],
        [1, *words(6, seed + 2)] if seed % 2 else [1, IMAGE, *words(4, seed + 2), 300],
    ]
    if text_only:
        rows = [[1, *words(8, seed)], [1, *words(6, seed + 2)]]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    labels = ids.masked_fill((ids == 0) | (ids == IMAGE), -100)
    labels[:, :3] = -100
    images = None if text_only else pictures(2, seed)
    return {"input_ids": ids, "attention_mask": ids != 0, "labels": labels, "images": images}


def one_step(model: Any) -> None:
    model(**batch_of(0)).loss.backward()


def two_forwards_then_two_backwards(model: Any) -> None:
    losses = [model(**batch_of(seed)).loss for seed in (1, 2)]
    for loss in losses:
        loss.backward()


def accumulation(model: Any) -> None:
    for seed in (0, 1, 2):
        (model(**batch_of(seed)).loss / 3).backward()


def generation_between_forward_and_backward(model: Any) -> None:
    loss = model(**batch_of(0)).loss
    model.eval()
    generate(model, ids_of(PROMPT), pictures(1))
    model.train()
    loss.backward()


def text_between_forward_and_backward(model: Any) -> None:
    losses = [model(**batch_of(0)).loss, model(**batch_of(0, text_only=True)).loss]
    for loss in losses:
        loss.backward()


def backward_in_another_thread(model: Any) -> None:
    loss = model(**batch_of(0)).loss
    with ThreadPoolExecutor(1) as thread:
        thread.submit(loss.backward).result()


def disabled_then_enabled(model: Any) -> None:
    with disabled(model):
        off = model(**batch_of(0)).loss
    on = model(**batch_of(1)).loss
    (on + off).backward()


RUNS = (
    one_step,
    two_forwards_then_two_backwards,
    accumulation,
    generation_between_forward_and_backward,
    text_between_forward_and_backward,
    backward_in_another_thread,
    disabled_then_enabled,
)


def gradients(model: Any, run: Callable[[Any], None], checkpointing: str) -> dict[str, Tensor]:
    train_setup(model, checkpointing)
    try:
        run(model)
        parameters = model.llava_steering.parameters()
        assert all(parameter.grad is not None for parameter in parameters.values())
        found = {name: parameter.grad.clone() for name, parameter in parameters.items()}
        model.zero_grad(set_to_none=True)
        return found
    finally:
        train_teardown(model)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("checkpointing", ["reentrant", "not reentrant"])
def test_gradient_checkpointing_gives_the_gradients_of_the_plain_run(
    model: Any, steered: Steered, run: Callable[[Any], None], checkpointing: str
) -> None:
    steered(tokens="f4+l5", modality="vis+text")
    plain = gradients(model, run, "off")
    again = gradients(model, run, checkpointing)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert gradient.abs().max() > 1e-6 or ".3.vis" in name or name.startswith("layers.3"), name
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-6, msg=name)


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
