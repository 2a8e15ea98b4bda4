"""Steering is measured where it happens: its size beside the hidden states, its directions, and single layers off."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from steered import BEFORE, PROMPT, TEXT, ids_of, load_llava, logits_of, pictures, strengthen
from tiny_llava import VISUAL_TOKENS, TinyLlava

from llava_steering_plugin import attach, disable_adapter
from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.measures.steering import (
    chance_similarity,
    principal_cosines,
    similarity,
    steerings,
    watched_norms,
    without_layer,
    without_layers,
)
from llava_steering_plugin.modes.mores import MoReS


@pytest.fixture(scope="module")
def model(tiny: TinyLlava, patched_llava: Any) -> Any:
    return load_llava(tiny.llava)


@pytest.fixture(scope="module")
def attachment(model: Any) -> Attachment:
    return strengthen(attach(model, MoReS(rank=2, tokens="all")))


def test_cosines_of_known_subspaces() -> None:
    basis = torch.linalg.qr(torch.randn(6, 6)).Q
    shared, own, other = basis[:1], basis[1:2], basis[2:3]
    angle = torch.tensor(0.3)
    tilted = angle.cos() * own + angle.sin() * other
    one, two = torch.cat([shared, own]), torch.cat([tilted, shared])
    expected = torch.tensor([1.0, angle.cos()]).double()
    torch.testing.assert_close(principal_cosines(one, two), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(principal_cosines(one, basis[3:6]), torch.zeros(2).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(principal_cosines(one, shared), torch.ones(1).double(), rtol=1e-6, atol=0)


def test_norms_are_those_of_the_updates_of_steered_tokens(model: Any, attachment: Attachment) -> None:
    found = steerings(attachment.modules)
    assert list(found) == [(f"layers.{number}", "vis") for number in range(4)]
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = []
    for number, layer in enumerate(model.model.layers):

        def keep(module: Any, args: Any, output: Any, number: int = number) -> None:
            seen[number] = args[0].clone(), output.clone()

        handles.append(layer.get_submodule("steering").register_forward_hook(keep))
    with watched_norms(found) as norms:
        logits_of(model, ids_of(PROMPT), pictures(1))
        logits_of(model, ids_of(TEXT), None)  # no image: nothing is steered
    for handle in handles:
        handle.remove()
    # `seen` holds the text's pass, which changed nothing; the image's is seen again.
    assert all(torch.equal(*pair) for pair in seen.values())
    handle = (
        model.model.layers[1]
        .get_submodule("steering")
        .register_forward_hook(lambda module, args, output: seen.update({1: (args[0].clone(), output.clone())}))
    )
    logits_of(model, ids_of(PROMPT), pictures(1))
    handle.remove()
    before, after = (each[0, BEFORE : BEFORE + VISUAL_TOKENS].double() for each in seen[1])
    (values,) = norms["layers.1", "vis"].values
    assert norms["layers.1", "vis"].tokens() == VISUAL_TOKENS
    assert norms["layers.1", "vis"].spread() == pytest.approx(values.std(correction=0).item())
    torch.testing.assert_close(values, (after - before).norm(dim=-1) / before.norm(dim=-1), rtol=1e-4, atol=1e-6)
    assert norms["layers.1", "vis"].mean() == pytest.approx(values.mean().item())
    with watched_norms(found) as norms:
        pass
    assert norms["layers.0", "vis"].mean() != norms["layers.0", "vis"].mean()


def test_a_layer_that_is_switched_off_steers_nothing_and_the_others_go_on(model: Any, attachment: Attachment) -> None:
    steered = logits_of(model, ids_of(PROMPT), pictures(1))
    with without_layer(attachment.modules["layers.1"]):
        less = logits_of(model, ids_of(PROMPT), pictures(1))
    assert not torch.allclose(steered, less)
    assert torch.equal(logits_of(model, ids_of(PROMPT), pictures(1)), steered)

    offset = attachment.modules["layers.1"].get_submodule("vis")
    kept = {name: value.detach().clone() for name, value in offset.named_parameters()}
    with torch.no_grad():
        offset.get_parameter("steer_shift").zero_()
        offset.get_parameter("steer_offset").zero_()
    assert torch.equal(logits_of(model, ids_of(PROMPT), pictures(1)), less)
    with torch.no_grad():
        for name, value in kept.items():
            offset.get_parameter(name).copy_(value)


def test_similarity_is_the_mean_cosine_and_chance_shrinks_with_the_width() -> None:
    basis = torch.eye(6)
    tilted = (basis[1:2] + basis[3:4]) / 2**0.5
    one, other = basis[:2], torch.cat([basis[:1], tilted])
    assert similarity(one, other) == pytest.approx((1 + 0.5**0.5) / 2)
    # For rank 1 the mean of |cosine| in D dimensions is close to sqrt(2 / (pi D)).
    assert chance_similarity(1, 1, 4096, draws=200) == pytest.approx((2 / math.pi / 4096) ** 0.5, rel=0.2)


def test_all_layers_off_are_the_base(model: Any, attachment: Attachment) -> None:
    with without_layers(attachment.modules.values()):
        off = logits_of(model, ids_of(PROMPT), pictures(1))
    with disable_adapter(model):
        assert torch.equal(logits_of(model, ids_of(PROMPT), pictures(1)), off)
