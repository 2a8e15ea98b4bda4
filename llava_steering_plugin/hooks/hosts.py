"""Let a mode's modules change the output of decoder layers and linears, which are called their hosts.

There are two ways: as children of their hosts, for one adapter that may be trained (`hang`), and through a hook that
finds each row's module, for pools of adapters (`SharedHooks`, `dispatch`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_steering_plugin.distributed import is_partitioned
from llava_steering_plugin.errors import SteeringError, listing, shortened
from llava_steering_plugin.hooks.row_groups import at_once
from llava_steering_plugin.hooks.scope import current
from llava_steering_plugin.modes.base import ForwardPass

# The name of a mode's module as a child of its host: part of the parameters' names in the checkpoints of a training.
CHILD = "steering"


def hang(stack: nn.Module, modules: dict[str, nn.Module]) -> list[RemovableHandle]:
    """Make each module a child of its host, on the host's device, and let it replace the host's output.

    Args:
        stack: the decoder stack.
        modules: by the path of their host below the stack.

    Returns:
        The handles of the hooks, for `unhang`.

    Raises:
        AttributeError: a path leads to no module; the stack is unchanged then.
        SteeringError: a host is in several places of the stack.
        RuntimeError: a device has no memory for a module; the stack is unchanged then, too.
    """
    hosts = {path: stack.get_submodule(path) for path in modules}
    refuse_shared(stack, hosts)
    for path, module in modules.items():  # this may run out of memory, so it comes before any host is touched
        module.train(hosts[path].training)
        device = device_of(hosts[path])
        if device is not None:
            module.to(device)
    handles: list[RemovableHandle] = []
    try:
        for path, module in modules.items():
            host = hosts[path]
            host.add_module(CHILD, module)
            handles.append(host.register_forward_hook(_replace_output, with_kwargs=True))
    except BaseException:
        unhang(stack, modules, handles)
        raise
    return handles


def refuse_shared(stack: nn.Module, paths: Iterable[str]) -> None:
    """Refuse hosts that are in several places of the stack: what changes one output would change the others.

    Raises:
        SteeringError: some are; all in one message.
    """
    places: dict[int, list[str]] = {}
    for path, part in stack.named_modules(remove_duplicate=False):
        places.setdefault(id(part), []).append(path)
    shared = {" and ".join(found) for path in paths if len(found := places[id(stack.get_submodule(path))]) > 1}
    if shared:
        raise SteeringError(
            listing(
                f"this {type(stack).__name__} has one module in several places, so an adapter on one of them would "
                "change the others too. Give each place a copy of its own (copy.deepcopy)",
                shortened(sorted(shared)),
            )
        )


def device_of(host: nn.Module) -> torch.device | None:
    """Return the device that `host` computes on: its parameters may be elsewhere, offloaded by accelerate.

    None if it has no parameters.
    """
    for part in host.modules():
        computes_on = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if computes_on is not None:
            return torch.device(computes_on)
    anchor = next(host.parameters(), None)
    return None if anchor is None else anchor.device


def unhang(stack: nn.Module, modules: dict[str, nn.Module], handles: list[RemovableHandle]) -> None:
    """Undo `hang`, also one that failed half-way."""
    for handle in handles:
        handle.remove()
    for path, module in modules.items():
        host = stack.get_submodule(path)
        if getattr(host, CHILD, None) is module:
            delattr(host, CHILD)


def _replace_output(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    this_pass = _this_pass()
    if this_pass is None:
        return None
    module: nn.Module = host.get_submodule(CHILD)
    hidden, inputs = hidden_of(output), inputs_of(args, kwargs)
    if shown_to_others(host, _replace_output):
        return replaced(output, module(hidden.clone(), inputs, this_pass, **of_host(module, host)))
    if getattr(module, "takes_backward", False) and (weight := frozen_weight(host, inputs, hidden)) is not None:
        return module(hidden.detach(), inputs, this_pass, weight)
    return replaced(output, module(hidden, inputs, this_pass, **of_host(module, host)))


def of_host(module: nn.Module, host: nn.Module) -> dict[str, Any]:
    """Return the further argument of a module that reads its host."""
    return {"host": host} if getattr(module, "takes_host", False) else {}


def shown_to_others(host: nn.Module, hook: Callable[..., Any]) -> bool:
    """Say whether hooks run on `host` before `hook`: they may keep its output, which must then not be written into."""
    hooks = tuple(host._forward_hooks.values())
    return (bool(hooks) and hooks[0] is not hook) or bool(nn.modules.module._global_forward_hooks)


def frozen_weight(host: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
    """Return the weight of a linear whose backward pass is a product with it and no more; else None.

    Not with quantised linears, trained ones, autocast, weights that are elsewhere outside of the forward pass or that
    ZeRO-3 has cut, and linears whose `forward` other code has replaced.
    """
    if not torch.is_grad_enabled() or type(host) is not nn.Linear or "forward" in host.__dict__:
        return None
    weight, bias = host.weight, host.bias
    if type(weight) is not nn.Parameter or weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if type(inputs) is not Tensor or inputs.dim() != 3 or not inputs.dtype == weight.dtype == output.dtype:
        return None
    # An offloaded weight is on no device now, and one that ZeRO-3 has cut is gone after the linear's own backward.
    if weight.device != output.device or is_partitioned(weight):
        return None
    return weight


def _this_pass() -> ForwardPass | None:
    """Return the pass that the hosts' modules work in; None where the adapter is switched off."""
    scope = current()
    return scope.this_pass if scope is not None else None


def inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the tensor that a layer or linear was called on, from the arguments of its call."""
    return args[0] if args else kwargs.get("hidden_states", kwargs.get("input"))


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states in the output of a layer (which may be a tuple) or linear."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def replaced(output: Any, hidden: Tensor) -> Any:
    """Return the output of a layer or linear with other hidden states in it."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class SharedHooks:
    """Keeps one hook on every host that at least one adapter works on.

    Args:
        register: puts the hook on the host at a path, and returns its handle.
    """

    def __init__(self, register: Callable[[str], RemovableHandle]):
        self._register = register
        self._handles: dict[str, RemovableHandle] = {}
        self._needed: Counter[str] = Counter()

    def need(self, paths: Iterable[str]) -> None:
        """Count one more adapter on the hosts at these paths, and hook those that had none; all of them, or none."""
        counted = []
        try:
            for path in paths:
                self._needed[path] += 1
                counted.append(path)
                if path not in self._handles:
                    self._handles[path] = self._register(path)
        except BaseException:
            self.release(counted)
            raise

    def release(self, paths: Iterable[str]) -> None:
        """Count one adapter less on the hosts at these paths, and unhook those that have none left."""
        for path in paths:
            self._needed[path] -= 1
            if not self._needed[path]:
                del self._needed[path]
                if (handle := self._handles.pop(path, None)) is not None:
                    handle.remove()


def dispatch(path: str) -> Callable[..., Any]:
    """Return a forward hook (with kwargs) for the host at `path`: it updates each row with its own adapter's module."""

    def hook(host: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        scope = current()
        if scope is None or not scope.groups:
            return None
        mine = [(group, group.modules[path]) for group in scope.groups if path in group.modules]
        if not mine:
            # Return before `rest` is unpacked: torch calls the hook without the keyword arguments while another thread
            # registers or removes it. Generations that need the hook run after its registration and before its removal.
            return None
        kwargs, output = rest
        hidden, inputs = hidden_of(output), inputs_of(args, kwargs)
        if shown_to_others(host, hook):
            hidden = hidden.clone()
        for group, module in at_once(scope.groups, mine, hidden.dtype):
            hidden = group.updated(module, hidden, inputs, of_host(module, host))
        return replaced(output, hidden)

    return hook
