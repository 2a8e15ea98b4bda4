"""Finds a model's decoder stack and hangs modules on its layers and linears. Structure decides, never model names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_steering_plugin.hooks.scope import current
from llava_steering_plugin.modes.base import ForwardPass

# The name under which a mode's module becomes a child of its host: part of the names in checkpoints of a training run.
CHILD = "steering"


def hang(stack: nn.Module, modules: dict[str, nn.Module]) -> list[RemovableHandle]:
    """Makes each module a child of its host, on the host's device, and lets it replace the host's output."""
    hosts = {path: stack.get_submodule(path) for path in modules}
    for path, module in modules.items():  # what may fail, for want of memory, comes before any host is touched
        module.train(hosts[path].training)
        device = device_of(hosts[path])
        if device is not None:
            module.to(device)
    handles = []
    for path, module in modules.items():
        host = hosts[path]
        host.add_module(CHILD, module)
        if hasattr(module, "enter"):
            handles.append(host.register_forward_pre_hook(_replace_input))
        handles.append(host.register_forward_hook(_replace_output, with_kwargs=True))
    return handles


def device_of(host: nn.Module) -> torch.device | None:
    """Where `host` computes: not always where its parameters are, which accelerate may have offloaded."""
    for part in host.modules():
        computes_on = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if computes_on is not None:
            return torch.device(computes_on)
    anchor = next(host.parameters(), None)
    return None if anchor is None else anchor.device


def unhang(stack: nn.Module, modules: dict[str, nn.Module], handles: list[RemovableHandle]) -> None:
    """Undoes `hang`."""
    for handle in handles:
        handle.remove()
    for path in modules:
        delattr(stack.get_submodule(path), CHILD)


def _replace_input(host: nn.Module, args: tuple[Any, ...]) -> Any:
    if not args or not torch.is_grad_enabled():
        return None
    if _this_pass() is None:
        return None
    module: Any = host.get_submodule(CHILD)
    return (module.enter(args[0]), *args[1:])


def _replace_output(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    this_pass = _this_pass()
    if this_pass is None:
        return None
    module: nn.Module = host.get_submodule(CHILD)
    return replaced(output, module(hidden_of(output), inputs_of(args, kwargs), this_pass))


def _this_pass() -> ForwardPass | None:
    """The pass that the hosts' modules work in; None where they are kept out."""
    scope = current()
    return scope.this_pass if scope is not None else None


def inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a layer or linear was called on, from the arguments of its call."""
    return args[0] if args else kwargs.get("hidden_states", kwargs.get("input"))


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a layer or linear gave."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def replaced(output: Any, hidden: Tensor) -> Any:
    """What a layer or linear gave, with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class SharedHooks:
    """One hook for every host that some adapter works on, for as long as one does.

    Args:
        register: puts the hook on the host at a path.
    """

    def __init__(self, register: Callable[[str], RemovableHandle]):
        self._register = register
        self._handles: dict[str, RemovableHandle] = {}
        self._needed: Counter[str] = Counter()

    def need(self, paths: Iterable[str]) -> None:
        """One adapter more works on the hosts at these paths."""
        for path in paths:
            if path not in self._handles:
                self._handles[path] = self._register(path)
            self._needed[path] += 1

    def release(self, paths: Iterable[str]) -> None:
        """One adapter less works on them."""
        for path in paths:
            self._needed[path] -= 1
            if not self._needed[path]:
                self._handles.pop(path).remove()


def dispatch(path: str) -> Callable[..., Any]:
    """A forward hook (with kwargs) for the host at `path`: sends each row of its output through its own module."""

    def hook(host: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        scope = current()
        if scope is None or not scope.groups:
            return None
        mine = [(group, group.modules[path]) for group in scope.groups if path in group.modules]
        if not mine:
            # Also where torch leaves out the keyword arguments: while another thread is registering or removing this
            # very hook. A generation whose adapters need it began after the one and ends before the other.
            return None
        kwargs, output = rest
        hidden, inputs = hidden_of(output), inputs_of(args, kwargs)
        for group, module in mine:
            hidden = group.updated(module, hidden, inputs)
        return replaced(output, hidden)

    return hook
