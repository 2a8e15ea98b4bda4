"""Reads the prompts of a batch one after the other, and goes on with all rows together.

On a CPU the time of a prefill is that of its positions. A padded batch has more of them than its rows, and no row has
its first token before all prompts have been read. One by one, each row is read as alone, to the bit, and its first
token is there at once. The rows' keys and values are padded on the left afterwards, as if they had been read together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from llava_steering_plugin.hooks.scope import Scope
from llava_steering_plugin.hooks.token_map import TokenMap
from llava_steering_plugin.pool.projectors import ServedRows

# Is told the numbers of some rows and their logits after the prompt, [rows, vocabulary].
Read = Callable[[Sequence[int], Tensor], None]
Forward = Callable[[dict[str, Any]], Any]

_read: ContextVar[Read | None] = ContextVar("llava_steering_row_by_row", default=None)


@contextmanager
def reading_row_by_row(read: Read) -> Iterator[None]:
    """Read the prompts of generations in the block, and in this thread, one by one where that is faster.

    Args:
        read: called for all rows, before their first logits processor, or for none.
    """
    token = _read.set(read)
    try:
        yield
    finally:
        _read.reset(token)


def run(scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Forward) -> Any:
    """Return what a model's forward returns, whose prompts are read one by one where that is wanted and possible.

    Args:
        args, kwargs: of the model's forward.
        forward: calls it with keyword arguments in the place of `kwargs`.
    """
    read = _wanted(scope, args, kwargs)
    return forward(kwargs) if read is None else _read_row_by_row(scope, kwargs, forward, read)


def _wanted(scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Read | None:
    """Return who is told of rows if a forward of a generation reads prompts that can be read one by one; else None.

    Accelerators read the prompts of a batch together: there the rows of a short prompt cost next to nothing.
    """
    read, embeds, attention = _read.get(), kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    if read is None or args or not scope.generating or not isinstance(scope.rows, ServedRows):
        return None
    if not isinstance(embeds, Tensor) or len(embeds) != len(scope.rows.pooled) or len(embeds) < 2:
        return None
    if embeds.device.type != "cpu" or kwargs.get("past_key_values") is not None:
        return None
    if not isinstance(attention, Tensor) or attention.shape != embeds.shape[:2]:
        return None
    present = attention.bool()
    padded_on_the_left = bool((present[:, 1:] >= present[:, :-1]).all()) and bool(present[:, -1].all())
    return read if padded_on_the_left else None


def _read_row_by_row(scope: Scope, kwargs: dict[str, Any], forward: Forward, read: Read) -> Any:
    """Return what `forward` returns for the prompts of a batch: logits after the prompt, and all keys and values.

    Rows of one adapter that works at decode steps are read together: what its prefill leaves is for all of them.

    Args:
        scope: of the generation; its rows and token map are those of the present part while that is read.
        kwargs: of the model's forward.
        forward: calls it.
    """
    rows, tokens = scope.rows, scope.tokens
    assert isinstance(rows, ServedRows)
    lengths = kwargs["attention_mask"].bool().sum(1).tolist()
    logits: list[Tensor | None] = [None] * len(lengths)
    caches: list[tuple[list[int], list[Any]]] = []
    try:
        for numbers in rows.parts():
            longest = max(lengths[number] for number in numbers)
            part = rows.only(numbers)
            scope.rows, scope.tokens = part, None if tokens is None else _cut_tokens(tokens, numbers, longest)
            output = forward(_cut_arguments(kwargs, numbers, longest))
            cache = output.past_key_values
            if not caches and not _is_joinable(cache, len(numbers), longest):
                scope.rows, scope.tokens = rows, tokens
                return forward(kwargs)
            last = output.logits[:, -1:]
            read(numbers, last[:, -1])
            for place, number in enumerate(numbers):
                logits[number] = last[place]
            rows.keep(part)
            caches.append((numbers, [list(layer) for layer in cache]))
    finally:
        scope.rows, scope.tokens = rows, tokens
    joined = torch.stack([each for each in logits if each is not None])
    return type(output)(logits=joined, past_key_values=_joined(caches, len(lengths), max(lengths)))


def _cut_arguments(kwargs: dict[str, Any], numbers: Sequence[int], longest: int) -> dict[str, Any]:
    cut = dict(kwargs)
    for name in ("inputs_embeds", "attention_mask", "position_ids"):
        if isinstance(kwargs.get(name), Tensor):
            cut[name] = _cut(kwargs[name], numbers, longest)
    return cut


def _cut_tokens(tokens: TokenMap, numbers: Sequence[int], longest: int) -> TokenMap:
    return TokenMap(*(_cut(part, numbers, longest) for part in (tokens.visual, tokens.attention, tokens.prompt)))


def _cut(part: Tensor, numbers: Sequence[int], longest: int) -> Tensor:
    """Return some rows of [rows, positions, ...], without the padding that all of them have on their left."""
    chosen = part[:, -longest:]
    return chosen[numbers[0] : numbers[0] + 1] if len(numbers) == 1 else chosen[list(numbers)]


def _is_joinable(cache: Any, rows: int, positions: int) -> bool:
    """Say whether a cache holds keys and values for each layer, [rows, heads, positions, features] each."""
    return isinstance(cache, tuple) and all(
        len(layer) == 2
        and isinstance(part, Tensor)
        and part.dim() == 4
        and part.shape[0] == rows
        and part.shape[2] == positions
        for layer in cache
        for part in layer
    )


def _joined(caches: Sequence[tuple[Sequence[int], list[Any]]], rows: int, longest: int) -> tuple[Any, ...]:
    """Return the caches of parts of a batch as one, padded on the left. Empties them, so that none is there twice."""
    layers = []
    for layer in range(len(caches[0][1])):
        sides = []
        for side in range(2):
            like = caches[0][1][layer][side]
            of_all = like.new_zeros(rows, like.shape[1], longest, like.shape[3])
            for numbers, cache in caches:
                part = cache[layer][side]
                of_all[list(numbers), :, longest - part.shape[2] :] = part
                cache[layer][side] = None
            sides.append(of_all)
        layers.append((sides[0], sides[1]))
    return tuple(layers)
