"""Choose the adapters of a pool for a block of code that knows nothing of pools."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.hooks.owner import owner_of
from llava_steering_plugin.hooks.scope import naming
from llava_steering_plugin.pool import row_names
from llava_steering_plugin.pool.pool import AdapterPool

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def use_adapter(model: PreTrainedModel, names: str | Sequence[str]) -> Iterator[None]:
    """Name the adapters for calls of `model` that name none, inside the block and in this thread.

        with use_adapter(model, "cats"):
            run_an_evaluation(model)

    Raises:
        SteeringError: the model carries no pool.
        ArgumentsError: an unknown name.
    """
    pool = owner_of(model)
    if not isinstance(pool, AdapterPool):
        raise SteeringError(f"this {type(model).__name__} carries no pool of adapters; AdapterPool(model) makes one.")
    names = row_names.listed(names)
    pool.check(names)
    with naming(pool, names):
        yield


# The name of the first versions.
using = use_adapter
