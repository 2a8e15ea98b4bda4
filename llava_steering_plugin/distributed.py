"""Reads and writes parameters that ZeRO-3 has cut into shards; without it a parameter is just a parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llava_steering_plugin.errors import SteeringError


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has cut `parameter` into shards, so that its data here is empty outside `gathered`."""
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], *, modify: bool = False) -> Iterator[None]:
    """Makes the parameters whole inside the block, on every rank; with `modify`, rank 0's changes reach all.

    All ranks must enter, also those that need no values. Without ZeRO-3 it does nothing.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(partitioned, modifier_rank=0 if modify else None):
        yield


def whole(parameter: nn.Parameter, keep: bool = True) -> Tensor:
    """A copy of the parameter on the processor; empty on the ranks that do not `keep` it. All ranks must call it.

    Raises:
        SteeringError: other ranks did not take part, so that only a shard is here.
    """
    with gathered([parameter]):
        if not keep:
            return torch.empty(0)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if parameter.shape != shape:
            raise SteeringError(
                f"a parameter of shape {list(shape)} is here as {list(parameter.shape)}, so it cannot be saved. Have "
                "every rank save, not the first alone."
            )
        return parameter.detach().cpu().clone()
