"""The bases of all layers at once: the same rows and gradients as alone, and kept only while nothing changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from routed import everything
from steered import away_from_identity
from torch import Tensor, nn

from llava_steering_plugin.modes.base import DecoderShape, LayerShape
from llava_steering_plugin.modes.mores import MoReS, Steering
from llava_steering_plugin.modes.mores_frames import Basis, orthonormal

WIDTH, LAYERS = 24, 3


def steerings(rank: int = 2) -> list[Steering]:
    """The steerings of three layers, in evaluation and far from the identity."""
    shape = DecoderShape(WIDTH, tuple(LayerShape(f"layers.{number}", {}) for number in range(LAYERS)))
    found = []
    for layer in MoReS(rank=rank).build(shape).values():
        away_from_identity(layer.eval())
        vis = layer.get_submodule("vis")
        assert isinstance(vis, Steering)
        found.append(vis)
    return found


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("training", [True, False])
def test_every_layer_gets_its_own_rows_out_of_the_one_factorisation(rank: int, training: bool) -> None:
    layers, this_pass = steerings(rank), everything(1, 1)
    for layer in layers:
        layer.train(training)
    for layer in layers:
        torch.testing.assert_close(layer.basis(this_pass), orthonormal(layer.steer_basis).basis, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_gradients_are_those_of_autograd_through_the_factorisation(rank: int, condition: float) -> None:
    stretch = torch.logspace(0, -torch.tensor(condition).log10().item(), rank).unsqueeze(1)
    raw = (stretch * torch.linalg.qr(torch.randn(WIDTH, rank))[0].T).requires_grad_()
    weights = torch.randn(rank, WIDTH)

    def gradient(basis: Tensor) -> Tensor:
        return torch.autograd.grad((basis * weights).sum(), raw)[0]

    with torch.no_grad():
        made = orthonormal(raw)
    ours, theirs = gradient(Basis.apply(raw, *made)), gradient(orthonormal(raw).basis)
    torch.testing.assert_close(ours / condition, theirs / condition, atol=1e-5, rtol=1e-4)


def test_second_derivatives_are_those_of_autograd() -> None:
    raw = torch.randn(3, WIDTH, requires_grad=True)
    weights = torch.randn(3, WIDTH)

    def penalty(basis: Tensor) -> Tensor:
        (first,) = torch.autograd.grad((basis * weights).sin().sum(), raw, create_graph=True)
        return torch.autograd.grad(first.square().sum(), raw)[0]

    with torch.no_grad():
        made = orthonormal(raw)
    torch.testing.assert_close(penalty(Basis.apply(raw, *made)), penalty(orthonormal(raw).basis), atol=1e-4, rtol=1e-4)


def write(layer: Steering) -> None:
    with torch.no_grad():
        layer.steer_basis.normal_()


def load(layer: Steering) -> None:
    layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()})


def load_by_assignment(layer: Steering) -> None:
    layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()}, assign=True)


def take_other_memory(layer: Steering) -> None:
    """Twice, so that the address that was kept is free again in between."""
    for _ in range(2):
        layer.steer_basis.data = torch.randn_like(layer.steer_basis)


def step_through_data(layer: Steering) -> None:
    """As optimizers that hold the parameters in one flat tensor."""
    layer.train()
    layer.steer_basis.data.normal_()
    layer.eval()


def cast(layer: Steering) -> None:
    layer.to(torch.bfloat16)


CHANGES = (write, load, load_by_assignment, take_other_memory, step_through_data, cast)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_kept_in_evaluation_follows_every_change_of_a_parameter(change: Callable[[Steering], None]) -> None:
    layer, *others = steerings()
    before = [each.basis(everything(1, 1)).clone() for each in (layer, *others)]
    change(layer)
    found = layer.basis(everything(1, 1))
    torch.testing.assert_close(found, orthonormal(layer.steer_basis).basis, atol=1e-6, rtol=0)
    assert not torch.allclose(found, before[0], atol=1e-4)
    for each, known in zip(others, before[1:], strict=True):
        torch.testing.assert_close(each.basis(everything(1, 1)), known, atol=1e-6, rtol=0)


def test_the_second_prefill_factors_nothing_and_a_training_pass_factors_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, shapes = steerings(), list[tuple[int, ...]]()
    plain = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda gram: (shapes.append(tuple(gram.shape)), plain(gram))[1])
    for _ in range(2):
        this_pass = everything(1, 1)
        for layer in layers:
            layer.basis(this_pass)
    assert shapes == [(LAYERS, 2, 2)]
    for layer in layers:
        layer.train()
    for this_pass in (everything(1, 1), everything(1, 1)):
        for layer in (*layers, *reversed(layers)):  # a recomputation of the same pass, too
            layer.basis(this_pass)
    assert shapes == [(LAYERS, 2, 2)] * 3


def test_what_an_answer_has_kept_serves_a_pass_with_gradients() -> None:
    layer = steerings()[0].requires_grad_(False)
    with torch.inference_mode():
        layer(torch.randn(3, WIDTH), everything(1, 1))
    hidden = torch.randn(3, WIDTH, requires_grad=True)
    layer(hidden, everything(1, 1)).sum().backward()
    assert hidden.grad is not None and bool(hidden.grad.any())


def test_a_parameter_that_is_cut_over_ranks_is_taken_alone_while_its_layer_runs() -> None:
    """ZeRO-3 marks parameters with `ds_id`; those of the other layers are empty then."""
    layer, *others = steerings()
    for each in (layer, *others):
        each.train()
        each.steer_basis.ds_id = 0  # type: ignore[attr-defined]
    for each in others:
        each.steer_basis.data = torch.empty(0)
    expected = orthonormal(layer.steer_basis).basis
    assert torch.equal(layer.basis(everything(1, 1)), expected)


def test_layers_on_other_devices_are_made_there() -> None:
    here, there, _ = steerings()
    there.to("meta")
    assert here.basis(everything(1, 1)).device.type == "cpu"
    assert there.basis(everything(1, 1)).device.type == "meta"


def test_a_module_that_was_moved_leaves_nothing_behind() -> None:
    layer = steerings()[0]
    layer.basis(everything(1, 1))
    kept = layer.frames._kept
    nn.ModuleList([layer]).to(torch.float32)
    assert layer not in kept
