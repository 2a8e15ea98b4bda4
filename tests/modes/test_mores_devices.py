"""MoReS on a device without float64: Apple's GPUs, which a stub stands for here.

The stub is a tensor that says it is on MPS and refuses float64 with MPS' own error; `to` moves it there and back.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llava_steering_plugin.modes.base import no_autocast
from llava_steering_plugin.modes.mores import Steering

MPS = torch.device("mps")


class OnMps(Tensor):
    """A tensor that says it is on MPS."""


class Stub(TorchFunctionMode):
    """Computes on the CPU what is asked of tensors on MPS, but for float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        there = isinstance(args[0], OnMps) if args else False
        if there and func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return MPS
        if func is Tensor.to and isinstance(args[1], torch.device):
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(OnMps if args[1] == MPS else Tensor)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, OnMps) and result.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return result


def test_the_stub_refuses_float64_as_the_device_does() -> None:
    with Stub():
        moved = torch.ones(2).to(MPS)
        assert moved.device == MPS and moved.to(torch.device("cpu")).device.type == "cpu"
        with pytest.raises(TypeError, match="float64"):
            moved.double()


def test_updates_and_gradients_without_float64_are_those_of_the_cpu_to_the_bit() -> None:
    torch.manual_seed(0)
    steering = Steering(32, 3)
    nn.init.normal_(steering.steer_shift)
    nn.init.normal_(steering.steer_offset)
    hidden = torch.randn(5, 32)
    expected = steering(hidden)
    expected.sin().sum().backward()
    gradients = [parameter.grad for parameter in steering.parameters()]
    steering.zero_grad(set_to_none=True)
    with Stub():
        for name, parameter in steering.named_parameters():
            setattr(steering, name, nn.Parameter(parameter.detach().as_subclass(OnMps)))
        assert steering.steer_basis.device == MPS
        update = steering(hidden.to(MPS))
        assert isinstance(update, OnMps) and isinstance(steering.basis(), OnMps)
        update.sin().sum().backward()
    assert torch.equal(update.as_subclass(Tensor), expected)
    for parameter, gradient in zip(steering.parameters(), gradients, strict=True):
        assert parameter.grad is not None and gradient is not None
        assert torch.equal(parameter.grad.as_subclass(Tensor), gradient)


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an Apple GPU; the stub stands for it above")
def test_updates_on_the_device_are_those_of_the_cpu() -> None:
    steering = Steering(32, 3)
    nn.init.normal_(steering.steer_shift)
    hidden = torch.randn(5, 32)
    expected = steering(hidden)
    torch.testing.assert_close(steering.to(MPS)(hidden.to(MPS)).cpu(), expected)


@pytest.mark.parametrize("kind", ["cpu", "meta", "mps"])
def test_autocast_can_be_switched_off_for_every_device_whether_or_not_it_has_one(kind: str) -> None:
    with torch.autocast("cpu", torch.bfloat16), no_autocast(torch.device(kind)):
        pass
