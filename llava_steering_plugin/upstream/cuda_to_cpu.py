"""Run programs of LLaVA that ask for CUDA by name on the CPU (`launch --cpu`).

LLaVA's evaluation scripts call `.cuda()`, `.to("cuda")` and `.to(device="cuda")`, and its loader puts models on "cuda"
by default. `redirect_cuda_to_cpu` changes what these calls mean for the rest of the process, so only the entry of a
program may call it.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from wrapt import register_post_import_hook

from llava_steering_plugin.upstream.seams import require


def redirect_cuda_to_cpu() -> None:
    """Make "cuda" mean the CPU in this process from now on, and hide all CUDA devices."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: `device_map="auto"` must not find a GPU, too
    import torch

    for kind in (torch.Tensor, torch.nn.Module):
        kind.to = _to_with_cpu_for_cuda(kind.to)  # type: ignore[method-assign]
        kind.cuda = _stay_on_cpu  # type: ignore[method-assign]
    torch.cuda.synchronize = _nothing_to_wait_for
    register_post_import_hook(_default_loader_to_cpu, "llava.model.builder")


def on_cpu(device: Any) -> Any:
    """Return the CPU in place of a CUDA device, however it is written, and anything else unchanged."""
    import torch

    if type(device) is int or (isinstance(device, str) and device.split(":")[0] == "cuda"):
        return "cpu"
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    return device


def _to_with_cpu_for_cuda(to: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(to)
    def redirected(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            args = (on_cpu(args[0]), *args[1:])  # a device can only be the first
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        return to(self, *args, **kwargs)

    return redirected


def _stay_on_cpu(self: Any, device: Any = None, non_blocking: bool = False, memory_format: Any = None) -> Any:
    """Replace Tensor.cuda and Module.cuda."""
    return self


def _nothing_to_wait_for(device: Any = None) -> None:
    """Replace torch.cuda.synchronize."""


def _default_loader_to_cpu(builder: ModuleType) -> None:
    load = require(builder, "load_pretrained_model")
    # LLaVA-NeXT's loader takes no device, only a device map.
    takes_device = "device" in inspect.signature(load).parameters

    @functools.wraps(load)
    def load_on_cpu(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(load).bind_partial(*args, **kwargs)
        if takes_device:
            given.arguments["device"] = on_cpu(given.arguments.get("device", "cuda"))
        elif given.arguments.get("device_map", "auto") == "auto":
            given.arguments["device_map"] = {"": "cpu"}
        return load(*given.args, **given.kwargs)

    builder.load_pretrained_model = load_on_cpu  # type: ignore[attr-defined]
