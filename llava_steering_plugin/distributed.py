"""Read and write parameters that DeepSpeed's ZeRO-3 has cut into shards, and ordinary ones in the same way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llava_steering_plugin.errors import SteeringError


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Say whether ZeRO-3 has cut `parameter` into shards, so that its data is empty on this rank outside `gathered`."""
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], *, modify: bool = False) -> Iterator[None]:
    """Gather the parameters whole on every rank for the block. Without ZeRO-3 it does nothing.

    All ranks must enter the block, also those that need no values.

    Args:
        parameters: any of a model's; those that are not cut stay as they are.
        modify: hand the changes that rank 0 makes inside the block on to all ranks.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(partitioned, modifier_rank=0 if modify else None):
        yield


def whole(parameter: nn.Parameter, keep: bool = True) -> Tensor:
    """Return a copy of the whole parameter on the CPU, in its dtype. All ranks must call it.

    Args:
        parameter: cut into shards or not.
        keep: False on ranks that need no copy; they get an empty tensor.

    Raises:
        SteeringError: other ranks did not take part, so that this rank has its shard alone.
    """
    with gathered([parameter]):
        if not keep:
            return torch.empty(0)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if parameter.shape != shape:
            raise SteeringError(
                f"a parameter of shape {list(shape)} has shape {list(parameter.shape)} on this rank, so it cannot be "
                "saved. Call the saving function on every rank, not on the first alone."
            )
        return parameter.detach().cpu().clone()
