"""DeepSpeed's ZeRO: the one place that names it. Everywhere else a parameter is just a parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


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
