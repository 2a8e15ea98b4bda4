"""Say in numbers which of an image's tokens an adapter steers, and find these tokens in a batch of vLLM's.

A batch of vLLM's holds pieces of prompts: a chunk may begin inside of an image, and what the cache holds is left out.
So every image feature carries its place in its image and the image's length, as digits in columns behind its values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.modes.mores_selection import TokenSelection

# How many selections an adapter's layers may have chosen among them, and how many terms one may join.
SELECTIONS, TERMS = 8, 8
# bfloat16 holds whole numbers up to 256.
DIGIT = 128
DIGITS = 4  # two for the place, two for the length
_KINDS = {"all": 1, "first": 2, "last": 3, "uniform": 4, "percent": 5}
_MOST = 1 << 40  # thousandths of tokens; more than any image has, and its products fit into 64 bits


def table_of(selections: Sequence[TokenSelection]) -> Tensor:
    """Write selections as numbers: int64 [SELECTIONS, TERMS, 2], a kind and an amount in thousandths each.

    Raises:
        ArgumentsError: there are too many, or one joins too many terms.
    """
    if len(selections) > SELECTIONS:
        raise ArgumentsError(
            f"its layers steer {len(selections)} different selections of tokens, more than {SELECTIONS}"
        )
    table = torch.zeros(SELECTIONS, TERMS, 2, dtype=torch.int64)
    for number, selection in enumerate(selections):
        if len(selection.terms) > TERMS:
            raise ArgumentsError(f"{selection.spec!r:.100} joins {len(selection.terms)} terms, more than {TERMS}")
        for term, (kind, amount) in enumerate(selection.terms):
            table[number, term] = torch.tensor([_KINDS[kind], min(round(amount * 1000), _MOST)])
    return table


def with_places(features: Tensor) -> Tensor:
    """Append to the features of one image [tokens, D] the columns that say where each stands: [tokens, D + DIGITS]."""
    count = len(features)
    if count >= DIGIT**2:
        raise ArgumentsError(f"an image of {count:,} tokens is too long; {DIGIT**2 - 1:,} can be told apart")
    place = torch.arange(count, device=features.device)
    length = torch.full_like(place, count)
    digits = torch.stack([place // DIGIT, place % DIGIT, length // DIGIT, length % DIGIT], 1)
    return torch.cat([features, digits.to(features.dtype)], 1)


def without_places(features: Tensor) -> tuple[Tensor, Tensor]:
    """Split what `with_places` made, or any rows of it, into the features and their digits."""
    return features[:, :-DIGITS], features[:, -DIGITS:]


def selected(tables: Tensor, digits: Tensor) -> Tensor:
    """Return which selections have a token, as bits: int64 [tokens].

    Args:
        tables: int64 [tokens, SELECTIONS, TERMS, 2], that of each token's adapter.
        digits: [tokens, DIGITS] in any dtype.
    """
    numbers = digits.round().long()
    place = (numbers[:, 0] * DIGIT + numbers[:, 1])[:, None, None]
    length = (numbers[:, 2] * DIGIT + numbers[:, 3])[:, None, None]
    kind, amount = tables.unbind(-1)
    whole = amount // 1000
    share = ((length * amount + 50_000) // 100_000).clamp(min=1)
    found = kind == _KINDS["all"]
    found |= (kind == _KINDS["first"]) & (place < whole)
    found |= (kind == _KINDS["last"]) & (place >= length - whole)
    found |= (kind == _KINDS["uniform"]) & _evenly(place, length, whole)
    found |= (kind == _KINDS["percent"]) & _evenly(place, length, share)
    bits = 1 << torch.arange(SELECTIONS, device=tables.device)
    return (found.any(-1) * bits).sum(-1)


def _evenly(place: Tensor, length: Tensor, count: Tensor) -> Tensor:
    """Return where `place` is one of `count` evenly spaced places: what `mores_selection._evenly` does, on a device."""
    count = torch.minimum(count, length)
    steps, span = (count - 1).clamp(min=1), (length - 1).clamp(min=1)
    nearest = (2 * place * steps + span) // (2 * span)
    spaced = (2 * nearest * span + steps) // (2 * steps) == place
    return torch.where(count == 1, place == length // 2, spaced & (nearest <= steps))
