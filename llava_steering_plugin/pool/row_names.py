"""Reads the names that a call gives its rows: a list of them, or one for all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from torch import Tensor

from llava_steering_plugin.errors import ArgumentsError

BASE = "__base__"
MOST_ROWS = 1 << 20


def listed(names: Any) -> str | Sequence[str]:
    """Return the names as one text or a list: they are gone through several times, which an iterator allows once.

    Raises:
        ArgumentsError: they are neither a text nor several.
    """
    if isinstance(names, str):
        return names
    try:
        return list(islice(names, MOST_ROWS))  # some iterators never end
    except TypeError as error:
        raise ArgumentsError(
            f"adapter_names is {names!r}. Give one name for each row, {BASE} for the plain model, or one text for all."
        ) from error


def check_count(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse any other number of names than the batch has rows."""
    given = (args[0] if args else None, *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")))
    rows = next((len(batch) for batch in given if isinstance(batch, Tensor)), len(names))
    if rows != len(names) or not names:
        raise ArgumentsError(
            f"adapter_names has {len(names)} names and the batch {rows} rows. Give one name for each row, {BASE} for "
            "the plain model, or one text for them all."
        )


def check_alone(names: str | Sequence[str]) -> None:
    """Refuse rows of the base beside those of adapters: for models that were changed for the adapters."""
    if not isinstance(names, str) and BASE in names:
        raise ArgumentsError(
            f"rows of {BASE} cannot be in a batch with these adapters, which changed the model's vocabulary or image "
            "settings. Ask the base in a batch of its own."
        )
