"""A look-alike shares every module but those that differ, also where accelerate and others have changed a module."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from llava_steering_plugin.hooks.look_alike import copied, look_alike, placed


class Scaled(nn.Module):
    """A module with a parameter of its own beside its children, and a setting."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 2.0))
        self.parts = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
        self.last = nn.Linear(3, 3)
        self.shift = 1.0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.parts(inputs) * self.scale + self.shift)
        return found


def changed(model: Scaled) -> tuple[Scaled, dict[str, Any]]:
    """A deep copy that differs everywhere, and what makes a look-alike of `model` equal to it."""
    other = copy.deepcopy(model)
    other.shift = 5.0
    other.last = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        for name in ("scale", "parts.2.weight"):
            other.get_parameter(name).add_(1)
    tensors = {name: other.get_parameter(name).detach() for name in ("scale", "parts.2.weight")}
    return other, {"tensors": tensors, "modules": {"last": other.last}, "attributes": {"": {"shift": 5.0}}}


def test_it_computes_as_what_is_given_says_and_leaves_the_other_alone() -> None:
    model, inputs = Scaled(), torch.randn(2, 3)
    before = model(inputs)
    other, differences = changed(model)
    alike = look_alike(model, **differences)
    assert torch.equal(alike(inputs), other(inputs))
    assert torch.equal(model(inputs), before)
    assert type(alike) is Scaled and alike.parts[0] is model.parts[0] and alike.parts[2] is not model.parts[2]
    assert model.state_dict().keys() == {*alike.state_dict().keys(), "last.bias"}


def test_hooks_that_are_on_the_modules_work_in_it_too() -> None:
    model = Scaled()
    seen = []
    model.parts[2].register_forward_hook(lambda host, args, output: seen.append(host))
    alike = look_alike(model, changed(model)[1]["tensors"])
    alike(torch.randn(2, 3))
    assert seen == [alike.parts[2]]


def test_what_accelerate_has_placed_on_a_device_computes_with_its_own_tensors() -> None:
    model, inputs = Scaled(), torch.randn(2, 3)
    other, differences = changed(model)
    for part in (model, model.parts, model.parts[0], model.parts[2], model.last):
        add_hook_to_module(part, AlignDevicesHook(execution_device="cpu", io_same_device=part is model))
    before = model(inputs)
    assert torch.equal(look_alike(model, **differences)(inputs), other(inputs))
    assert torch.equal(model(inputs), before)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(inputs), before)


def test_a_value_is_moved_once_and_may_have_gradients_behind_it() -> None:
    layer = nn.Linear(2, 2)
    value = torch.ones(2, 2)
    assert placed(value, layer.weight, layer) is value
    with torch.inference_mode():
        moved = placed(value, layer.half().weight, layer)
    assert moved.dtype == torch.float16 and not moved.is_inference()


def test_a_copy_of_what_accelerate_has_placed_computes_with_its_own_values() -> None:
    part = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    for module in (part, *part):
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    own = copied(part)
    with torch.no_grad():
        own[0].weight.zero_()
        own[0].bias.fill_(2.0)
    inputs = torch.randn(3, 4)
    assert torch.equal(own(inputs), nn.functional.gelu(torch.full((3, 4), 2.0)))
    assert not torch.equal(part(inputs), own(inputs))
    assert not any(hasattr(module, "_hf_hook") for module in own.modules())
    assert all(hasattr(module, "_hf_hook") for module in (part, *part))
