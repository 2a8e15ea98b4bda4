"""Modules change the output of their hosts, as their children or through one shared hook, and leave no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.hooks.hosts import CHILD, SharedHooks, device_of, dispatch, hang, unhang
from llava_steering_plugin.hooks.row_groups import Group
from llava_steering_plugin.hooks.scope import Scope, entered
from llava_steering_plugin.modes.base import ForwardPass


class Adds(nn.Module):
    """Adds its parameter to the output of its host."""

    def __init__(self, amount: float):
        super().__init__()
        self.amount = nn.Parameter(torch.tensor(amount))

    def forward(self, output: Tensor, inputs: Tensor, this_pass: ForwardPass) -> Tensor:
        return output + self.amount * this_pass.visual[..., None]


class Layer(nn.Module):
    """Returns a tuple, as decoder layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, str]:
        return self.linear(hidden_states), "the rest"


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Layer()).eval()


def a_pass(visual: list[list[int]]) -> ForwardPass:
    mask = torch.tensor(visual).bool()
    return ForwardPass(mask, ~mask, torch.ones_like(mask), False, {})


HIDDEN = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
VISUAL = [[1, 0, 0], [0, 1, 1]]


@pytest.mark.parametrize("how", [lambda layer: layer(HIDDEN), lambda layer: layer(hidden_states=HIDDEN)])
def test_a_child_changes_the_hidden_states_of_a_layers_tuple_inside_a_scope_only(how: Any) -> None:
    layers, module = stack(), Adds(2.0)
    plain, rest = how(layers[0])
    handles = hang(layers, {"0": module})
    assert layers[0].get_submodule(CHILD) is module and not module.training
    assert torch.equal(how(layers[0])[0], plain), "no scope, so no pass that the module could work in"
    with entered(Scope(this_pass=a_pass(VISUAL))):
        changed, kept = how(layers[0])
    assert torch.equal(changed, plain + 2 * torch.tensor(VISUAL)[..., None]) and kept == rest
    with entered(Scope(this_pass=None)):
        assert torch.equal(how(layers[0])[0], plain)
    unhang(layers, {"0": module}, handles)
    assert not hasattr(layers[0], CHILD) and not layers[0]._forward_hooks
    assert list(layers.state_dict()) == list(stack().state_dict())


def test_a_path_without_a_host_leaves_the_others_untouched() -> None:
    layers = stack()
    with pytest.raises(AttributeError):
        hang(layers, {"0": Adds(1.0), "7": Adds(1.0)})
    assert not hasattr(layers[0], CHILD) and not layers[0]._forward_hooks


class Fuses(Adds):
    """Does the backward pass of its linear too."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.takes_backward = True
        self.given: list[Tensor | None] = []

    def forward(self, output: Tensor, inputs: Tensor, this_pass: ForwardPass, weight: Tensor | None = None) -> Tensor:
        self.given.append(weight)
        assert (weight is None) or not output.requires_grad
        return output if weight is None else output + 0 * inputs.sum()


def test_a_module_takes_the_backward_pass_of_plain_frozen_linears_in_passes_with_gradients_only() -> None:
    layers, module = stack(), Fuses()
    linear = layers[0].linear.requires_grad_(False)
    inputs = HIDDEN.clone().requires_grad_()
    hang(layers, {"0.linear": module})

    def takes(*, given: Tensor = inputs) -> bool:
        with entered(Scope(this_pass=a_pass([[0, 0, 0], [0, 0, 0]]))):
            linear(given)
        return module.given[-1] is not None

    assert takes() and module.given[-1] is linear.weight
    with torch.no_grad():
        assert not takes()
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes()
    linear.bias.requires_grad_(True)
    assert not takes()
    linear.bias.requires_grad_(False)
    module.takes_backward = False
    assert not takes()
    module.takes_backward = True
    linear.forward = linear.forward
    assert not takes(), "another library has put its own forward there"
    del linear.forward
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not takes(), "somebody sees the output before the module does"
    hook.remove()
    assert takes()
    cpu_offload(linear, torch.device("cpu"))
    assert not takes(), "the weight is on the meta device until the linear is called again"


class Doubles(Adds):
    """Writes into the output of its host, as modules may."""

    def forward(self, output: Tensor, inputs: Tensor, this_pass: ForwardPass) -> Tensor:
        return output.mul_(2)


@pytest.mark.parametrize("shared", [False, True], ids=["a child", "a shared hook"])
def test_a_hook_that_was_there_before_sees_the_hosts_own_output(shared: bool) -> None:
    layers, seen, module = stack().requires_grad_(False), [], Doubles(0.0)
    linear = layers[0].linear
    plain = linear(HIDDEN)
    before = linear.register_forward_hook(lambda host, args, output: seen.append(output))
    this_pass = a_pass(VISUAL)
    if shared:
        linear.register_forward_hook(dispatch("0.linear"), with_kwargs=True)
        scope = Scope(groups=(Group({"0.linear": module}, this_pass, None, (2, 3)),))
    else:
        hang(layers, {"0.linear": module})
        scope = Scope(this_pass=this_pass)
    with entered(scope):
        assert torch.equal(linear(HIDDEN), 2 * plain)
        assert torch.equal(seen[0], plain)
        before.remove()
        assert torch.equal(linear(HIDDEN), 2 * plain)


def test_a_host_in_two_places_is_refused_and_nothing_is_hung() -> None:
    layers = nn.Sequential(Layer(), Layer(), Layer())
    layers[2].linear = layers[0].linear
    for paths in (["0.linear"], ["1.linear", "2.linear"], ["0.linear", "2.linear"]):
        with pytest.raises(SteeringError, match=r"several places.*\n  - 0\.linear and 2\.linear"):
            hang(layers, {path: Adds(1.0) for path in paths})
    assert not any(hasattr(part, CHILD) or part._forward_hooks for part in layers.modules())
    hang(layers, {"1.linear": Adds(1.0), "0": Adds(1.0)})  # not these


def test_the_device_is_where_an_offloaded_host_computes() -> None:
    layers = stack()
    cpu_offload(layers, torch.device("cpu"))
    assert next(layers[0].parameters()).device.type == "meta"
    assert device_of(layers[0]) == torch.device("cpu")
    assert device_of(nn.ReLU()) is None


def test_a_shared_hook_stays_until_the_last_adapter_has_gone() -> None:
    layers = stack()
    hooks = SharedHooks(lambda path: layers.get_submodule(path).register_forward_hook(lambda *_: None))

    def hooked() -> list[int]:
        return [len(layers.get_submodule(path)._forward_hooks) for path in ("0", "0.linear")]

    hooks.need(["0", "0.linear"])
    hooks.need(["0"])
    assert hooked() == [1, 1]
    hooks.release(["0", "0.linear"])
    assert hooked() == [1, 0]
    hooks.release(["0"])
    assert hooked() == [0, 0]
    hooks.need(["0"])
    assert hooked() == [1, 0]


def test_dispatch_updates_each_row_with_its_own_module_and_leaves_the_others() -> None:
    layers = stack()
    layers[0].register_forward_hook(dispatch("0"), with_kwargs=True)
    with torch.no_grad():
        plain, _ = layers(HIDDEN)
        groups = (
            Group({"0": Adds(2.0)}, a_pass([[1, 1, 1]]), torch.tensor([1]), (2, 3)),
            Group({"elsewhere": Adds(5.0)}, a_pass([[1, 1, 1]]), torch.tensor([0]), (2, 3)),
        )
        with entered(Scope(groups=groups)):
            changed, rest = layers(HIDDEN)
        assert torch.equal(changed[1], plain[1] + 2) and torch.equal(changed[0], plain[0]) and rest == "the rest"
        assert torch.equal(layers(HIDDEN)[0], plain)
