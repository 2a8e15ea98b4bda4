"""Make a model that shares all its modules with another one but for a few that differ, or copy a module whole.

Calls of the copy and of the original may run at the same time: neither sees what the other has in its place. Nothing is
copied but the dicts of the modules on the way from the model to what differs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llava_steering_plugin.distributed import is_partitioned
from llava_steering_plugin.hooks.hosts import device_of

M = TypeVar("M", bound=nn.Module)


def look_alike(
    module: M,
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module] | None = None,
    attributes: Mapping[str, Mapping[str, Any]] | None = None,
) -> M:
    """Return a module that is `module` but for what is given.

    Args:
        tensors: in place of parameters, by their names below `module`.
        modules: in place of submodules, by their paths.
        attributes: in place of attributes of submodules, by their paths; those of `module` itself under "".
    """
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    modules, attributes = modules or {}, attributes or {}
    own = {name: value for name, value in tensors.items() if "." not in name}
    if own:
        _leave_engines(copy, own)
        copy.__dict__["_parameters"] = {**module._parameters, **own}
    copy.__dict__.update(attributes.get("", {}))
    names = {path.partition(".")[0] for path in (*(tensors.keys() - own.keys()), *modules, *attributes)} - {""}
    children = {
        name: modules[name]
        if name in modules
        else look_alike(module.get_submodule(name), *(_below(name, given) for given in (tensors, modules, attributes)))
        for name in names
    }
    copy.__dict__["_modules"] = {**module._modules, **children}
    if "_hf_hook" in copy.__dict__:
        _follow_device(copy, module, moved=bool(own))
    return copy


def _below(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is given for the submodule `name`, under the paths below it."""
    prefix = f"{name}."
    found = {path.removeprefix(prefix): value for path, value in given.items() if path.startswith(prefix)}
    return found | ({"": given[name]} if name in given else {})


def _leave_engines(copy: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Take the hooks off where ZeRO-3 has put them: they gather parameters, and these tensors are none."""
    replaced = (copy._parameters.get(name) for name in tensors)
    if any(parameter is not None and is_partitioned(parameter) for parameter in replaced):
        copy.__dict__.update({name: OrderedDict() for name in copy.__dict__ if name.endswith("_hooks")})


def _follow_device(copy: nn.Module, module: nn.Module, *, moved: bool) -> None:
    """Give the copy of a module that accelerate has placed on a device a forward of its own: the other's is bound.

    Args:
        moved: the copy has tensors of its own, which are on the device already.
    """
    from accelerate.utils import send_to_device

    hook, device = copy.__dict__["_hf_hook"], device_of(module)
    run = type(module).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if moved:
            return run(copy, *send_to_device(args, device), **send_to_device(kwargs, device))
        args, kwargs = hook.pre_forward(copy, *args, **kwargs)
        return hook.post_forward(copy, run(copy, *args, **kwargs))

    copy.__dict__["forward"] = forward


def placed(value: Tensor, like: Tensor, host: nn.Module) -> Tensor:
    """Return a tensor in the dtype and on the device of the parameter `like` of `host`; itself if it is there."""
    device = device_of(host) if like.is_meta else like.device  # on "meta" where accelerate has offloaded it
    if value.device == device and value.dtype == like.dtype:
        return value
    with torch.inference_mode(False):  # it is kept, and later calls may want gradients through it
        return value.to(device, like.dtype)


def copied(module: nn.Module) -> nn.Module:
    """Copy a module and its values, without what accelerate has put on it.

    accelerate binds the forward of what it places on a device to the module itself: the copy's would be the original's.
    """
    hooks = [vars(part)["_hf_hook"] for part in module.modules() if "_hf_hook" in vars(part)]
    own = deepcopy(module, {id(hook): None for hook in hooks})
    for part in own.modules():
        if "_hf_hook" in vars(part):
            for name in ("_hf_hook", "_old_forward", "forward"):
                vars(part).pop(name, None)
    return own
