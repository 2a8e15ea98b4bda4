"""Names and fills the parameters of a mode's modules, also those that ZeRO-3 has cut."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from llava_steering_plugin.distributed import gathered, is_partitioned


def parameters_of(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Name every parameter of a mode's modules `<host path>.<name in the module>`."""
    return {
        f"{path}.{name}": parameter
        for path, module in modules.items()
        for name, parameter in getattr(module, "stored_parameters", module.named_parameters)()
    }


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the whole parameter's shape, also where only a shard of it is here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@torch.no_grad()
def set_parameters(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into parameters of the same names and shapes."""
    for name, parameter in parameters.items():
        with gathered([parameter], modify=True) if is_partitioned(parameter) else nullcontext():
            parameter.copy_(tensors[name])


def flaw(tensor: Tensor) -> str | None:
    """Say how many values are NaN or infinite; None if all are finite."""
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return None
    return f"{int((~finite).sum())} of {tensor.numel()} values are NaN or infinite"
