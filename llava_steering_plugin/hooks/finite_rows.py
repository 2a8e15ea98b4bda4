"""Ends those rows of a generation whose logits are NaN or infinite, so that the other rows are answered.

Sampling draws the next tokens of all rows in one call, which fails for all of them if one has no probabilities; greedy
decoding takes any token.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from llava_steering_plugin.errors import NotFiniteError, NotFiniteWarning

# What takes the place of a row's logits: the end has 0, all others this. Finite, also in float16.
UNLIKELY = -1e4

_kept: ContextVar[dict[int, str] | None] = ContextVar("llava_steering_broken_rows", default=None)


class FiniteRows:
    """Looks at the logits of every step of a generation, as one of transformers' logits processors.

    Args:
        end: the token that ends a row; without one, the row goes on with token 0 until the others have ended.
    """

    def __init__(self, end: int | None):
        self._end = 0 if end is None else end
        self._broken: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        broken = not_finite(scores)
        if self._broken is not None and self._broken.shape == broken.shape:
            broken = broken | self._broken
        self._broken = broken
        ended = torch.full_like(scores[:1], UNLIKELY)
        ended[:, self._end] = 0
        return torch.where(broken.unsqueeze(1), ended, scores)

    def broken(self, count: int | None) -> tuple[list[int], bool]:
        """Return the numbers of the rows that had to be ended, and whether these are all rows.

        Args:
            count: of the rows of the call, each of which `generate` may have repeated; None if it is unknown, and the
                numbers are those of the repeated rows then.
        """
        if self._broken is None:
            return [], False
        times = max(1, len(self._broken) // count) if count is not None else 1
        rows = sorted({row // times for row in self._broken.nonzero().flatten().tolist()})
        return rows, bool(self._broken.all())


def not_finite(scores: Tensor) -> Tensor:
    """Return bool [rows]: where [rows, vocabulary] scores are NaN or infinite. Does not wait for the device."""
    # The maximum is NaN where any score is, and infinite where any is, or none is finite. Forbidden tokens have -inf
    # rightly.
    return ~torch.isfinite(scores.amax(-1))


def watched(
    generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], rows: FiniteRows
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call of `generate` with one more logits processor, after the caller's own."""
    name = "logits_processor"
    try:
        given = inspect.signature(generate).bind_partial(*args).arguments
    except TypeError:
        return args, kwargs  # generate's own complaint is the right one
    if name in given:
        place = list(given).index(name)
        return (*args[:place], [*(args[place] or ()), rows], *args[place + 1 :]), kwargs
    return args, {**kwargs, name: [*(kwargs.get(name) or ()), rows]}


def end_token(model: Any, kwargs: dict[str, Any]) -> int | None:
    """Return the token that ends a row of this call of `generate`; None if none does."""
    settings = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    end = kwargs.get("eos_token_id", getattr(settings, "eos_token_id", None))
    if isinstance(end, Sequence):
        end = end[0] if end else None
    return end if isinstance(end, int) else None


@contextmanager
def broken_rows() -> Iterator[dict[int, str]]:
    """Yield the rows that have no answer, with the reason, of the generations in the block and in this thread.

    They raise no `NotFiniteError` then, nor do they warn.
    """
    kept: dict[int, str] = {}
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


def report(rows: FiniteRows, count: int | None, spelled: Callable[[list[int]], str]) -> None:
    """Say which rows have no answer, once a generation has ended.

    Args:
        count: of the rows of the call, if it is known.
        spelled: names the adapters of rows, by their numbers.

    Raises:
        NotFiniteError: no row has one. Where others have, it is a `NotFiniteWarning`.
    """
    broken, whole = rows.broken(count)
    if not broken:
        return
    text = (
        f"the logits became NaN or infinite with {spelled(broken)}. Its training has diverged, or it does not fit the "
        "precision of this model: load the base in bfloat16 or float32, or take an earlier checkpoint."
    )
    kept = _kept.get()
    if kept is not None:
        kept |= dict.fromkeys(broken, text)
    elif whole:
        raise NotFiniteError(f"no answer: {text}", broken)
    else:
        warnings.warn(NotFiniteWarning(f"no answer in rows {_listed(broken)}: {text}", broken), stacklevel=2)


def _listed(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows))
