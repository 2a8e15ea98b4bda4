"""Which of an image's tokens are steered, and which decoder layers: the small languages of two flags.

Tokens (per image): `all`, `f4` (first 4), `l5` (last 5), `f4+l5`, `uniform9` (9 evenly spaced, both ends included),
`1%` (1 % of the image's tokens, at least one, evenly spaced). Layers: `all`, `7`, `0-15`, `every:2`, joined by commas.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

_TERM = re.compile(r"(?P<all>all)|f(?P<first>\d+)|l(?P<last>\d+)|uniform(?P<uniform>\d+)|(?P<percent>\d+(\.\d+)?)%")


@dataclass(frozen=True)
class TokenSelection:
    """A parsed token spec; `terms` are (kind, amount) pairs whose union is selected."""

    spec: str
    terms: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, spec: str) -> TokenSelection:
        """Raises ValueError with the accepted forms."""
        terms = []
        for part in spec.split("+"):
            match = _TERM.fullmatch(part.strip())
            kind = match.lastgroup if match else None
            if match is None or kind is None:
                raise ValueError(f"{part.strip()!r} is none of all, fN, lN, uniformN, P% (join terms with '+': f4+l5)")
            amount = float(match[kind]) if kind != "all" else 0.0
            if kind != "all" and (amount <= 0 or (kind == "percent" and amount > 100)):
                raise ValueError(f"{part.strip()!r} selects nothing or more than everything")
            terms.append((kind, amount))
        return cls(spec, tuple(terms))

    def mask(self, candidates: Tensor, *, per_row: bool = False) -> Tensor:
        """Selects among `candidates`, bool [rows, positions]; returns the same shape.

        Every run of adjacent candidates is one image; with `per_row`, all candidates of a row are one run.
        Adjacent images with no text between them cannot be told apart and count as one.
        """
        place, length = _places(candidates, per_row)
        chosen = torch.zeros_like(candidates)
        for kind, amount in self.terms:
            if kind == "all":
                chosen |= candidates
            elif kind == "first":
                chosen |= place < amount
            elif kind == "last":
                chosen |= place >= length - amount
            elif kind == "uniform":
                # No more than there are positions: an absurd number must not overflow the tensor.
                chosen |= _evenly(place, length, torch.full_like(length, min(int(amount), candidates.shape[1])))
            else:
                # Half rounds up, in integers: the count must not depend on a device's rounding.
                thousandths = round(amount * 1000)
                count = ((length * thousandths + 50_000) // 100_000).clamp(min=1)
                chosen |= _evenly(place, length, count)
        return chosen & candidates


def _places(candidates: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """For each candidate its place in its run, from 0, and the run's length; int64 [rows, positions] each."""
    ones = candidates.long()
    if per_row:
        return ones.cumsum(1) - 1, ones.sum(1, keepdim=True).expand_as(ones)
    before = torch.zeros_like(candidates)
    before[:, 1:] = candidates[:, :-1]
    starts = candidates & ~before
    position = torch.arange(candidates.shape[1], device=candidates.device).expand_as(ones)
    place = position - (position * starts).cummax(1).values
    run = starts.long().cumsum(1) * ones
    lengths = torch.zeros(ones.shape[0], ones.shape[1] + 1, dtype=torch.long, device=ones.device)
    lengths.scatter_add_(1, run, ones)
    return place, lengths.gather(1, run)


def _evenly(place: Tensor, length: Tensor, count: Tensor) -> Tensor:
    """True where `place` is one of `count` evenly spaced places of `length`; a single one sits in the middle.

    Place j of N is round(j (length - 1) / (N - 1)): the first and the last token are always among N >= 2.
    """
    count = torch.minimum(count, length)
    steps, span = (count - 1).clamp(min=1), (length - 1).clamp(min=1)
    nearest = (2 * place * steps + span) // (2 * span)
    spaced = (2 * nearest * span + steps) // (2 * steps) == place
    return torch.where(count == 1, place == length // 2, spaced & (nearest <= steps))


def parse_layers(spec: str, total: int | None = None) -> list[int]:
    """The layer numbers that `spec` names out of `total` (None: only the spelling is checked), in order.

    Raises:
        ValueError: with what is wrong and the accepted forms.
    """
    chosen: set[int] = set()
    count = total if total is not None else 0
    for part in (piece.strip() for piece in spec.split(",")):
        if part == "all":
            chosen.update(range(count))
        elif match := re.fullmatch(r"every:([1-9]\d*)", part):
            chosen.update(range(0, count, int(match[1])))
        elif match := re.fullmatch(r"(\d+)(?:-(\d+))?", part):
            first, last = int(match[1]), int(match[2] or match[1])
            if first > last:
                raise ValueError(f"{part!r} runs backwards; write {last}-{first}")
            if total is not None and last >= total:
                raise ValueError(f"{part!r} goes beyond layer {total - 1}, the last of {total}")
            if total is not None:
                chosen.update(range(first, last + 1))
        else:
            raise ValueError(f"{part!r} is none of all, N, A-B, every:K (join with commas: 0-7,12,20-31)")
    return sorted(chosen)
