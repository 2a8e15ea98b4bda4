"""Modules change the output of their hosts, as their children or through one shared hook, and leave no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

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


def test_enter_replaces_the_input_in_passes_with_gradients_only() -> None:
    class Enters(Adds):
        def enter(self, inputs: Tensor) -> Tensor:
            entered_with.append(inputs)
            return inputs + 1

    entered_with: list[Tensor] = []
    layers, this_pass = stack(), a_pass([[0, 0, 0], [0, 0, 0]])
    linear = layers[0].linear
    plain, above = linear(HIDDEN), linear(HIDDEN + 1)
    hang(layers, {"0.linear": Enters(0.0)})
    with entered(Scope(this_pass=this_pass)):
        assert torch.equal(linear(HIDDEN), above)
        with torch.no_grad():
            assert torch.equal(linear(HIDDEN), plain)
    assert torch.equal(linear(HIDDEN), plain)
    assert len(entered_with) == 1


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
