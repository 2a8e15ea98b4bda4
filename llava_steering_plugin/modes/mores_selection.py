"""Read the two flags that choose what MoReS steers: which of an image's tokens, and which decoder layers.

Tokens (per image): `all`, `f4` (first 4), `l5` (last 5), `f4+l5`, `uniform9` (9 evenly spaced, both ends included),
`1%` (1 % of the image's tokens, at least one, evenly spaced). Of several, joined by commas, each layer learns which.
Layers: `all`, `7`, `0-15`, `every:2`, joined by commas.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# bool or int64 [rows, positions].
Places = npt.NDArray[Any]

_TERM = re.compile(r"(?P<all>all)|f(?P<first>\d+)|l(?P<last>\d+)|uniform(?P<uniform>\d+)|(?P<percent>\d+(\.\d+)?)%")
# More tokens than any image has. A longer number is none to a float, and means the same.
_ALL_OF_ANY = 1e15
# A layer's choice is a score for each selection, and a mask over all tokens.
MANY = 32


@dataclass(frozen=True)
class TokenSelection:
    """Selects tokens of images, as a parsed flag says.

    Attributes:
        spec: the flag as written.
        terms: (kind, amount) pairs; a token that one of them selects is selected.
    """

    spec: str
    terms: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, spec: str) -> TokenSelection:
        """Return the selection that the text of a flag stands for.

        Raises:
            ValueError: the text is none of the accepted forms, which the message lists.
        """
        terms = []
        for part in spec.split("+"):
            match = _TERM.fullmatch(part.strip())
            kind = match.lastgroup if match else None
            if match is None or kind is None:
                raise ValueError(
                    f"{part.strip()!r:.100} is none of all, fN, lN, uniformN, P% (join terms with '+': f4+l5)"
                    f"{_in_percent(part.strip())}"
                )
            amount = min(float(match[kind]), _ALL_OF_ANY) if kind != "all" else 0.0
            if kind != "all" and (amount <= 0 or (kind == "percent" and amount > 100)):
                raise ValueError(f"{part.strip()!r} selects nothing or more than everything")
            terms.append((kind, amount))
        return cls(spec, tuple(terms))

    @property
    def meaning(self) -> frozenset[tuple[str, float]]:
        """Return what is equal for two ways to write one selection, such as 100% and all."""
        return frozenset(("all", 0.0) if term == ("percent", 100.0) else term for term in self.terms)

    @property
    def has_percentage(self) -> bool:
        """Say whether the number of tokens depends on the size of an image."""
        return any(kind == "percent" for kind, _ in self.terms)

    def count(self, tokens: int) -> int:
        """Return how many are selected of an image of `tokens` tokens."""
        return int(self._mask(np.ones((1, tokens), dtype=bool), per_row=False).sum())

    def mask(self, candidates: Tensor, *, per_row: bool = False) -> Tensor:
        """Select among the True positions of `candidates`; return bool [rows, positions], in CPU memory.

        Every run of adjacent candidates is one image; with `per_row`, all candidates of a row are one run.
        Adjacent images with no text between them cannot be told apart and count as one.

        Args:
            candidates: bool [rows, positions].
            per_row: count all candidates of a row as one run.
        """
        return torch.from_numpy(self._mask(candidates.cpu().numpy(), per_row))

    def numbers(self, candidates: Tensor, *, per_row: bool = False) -> Tensor:
        """Return the numbers of what `mask` selects among the flattened positions; int64 [tokens], in CPU memory.

        Computed there too: a device would launch forty operations, and wait for their result all the same.
        """
        return torch.from_numpy(np.flatnonzero(self._mask(candidates.cpu().numpy(), per_row)))

    def _mask(self, candidates: Places, per_row: bool) -> Places:
        if any(kind == "all" for kind, _ in self.terms):
            return candidates.copy()
        place, length = _places(candidates, per_row)
        chosen = np.zeros_like(candidates)
        for kind, amount in self.terms:
            if kind == "first":
                chosen |= place < amount
            elif kind == "last":
                chosen |= place >= length - amount
            elif kind == "uniform":
                # No more than there are positions: an absurd number must not overflow an integer.
                chosen |= _evenly(place, length, np.full_like(length, int(min(amount, candidates.shape[1]))))
            else:
                # Halves are rounded up, in integers: the count must not depend on a machine's rounding.
                thousandths = round(amount * 1000)
                count = np.maximum((length * thousandths + 50_000) // 100_000, 1)
                chosen |= _evenly(place, length, count)
        return chosen & candidates


def parse_choices(spec: str) -> tuple[TokenSelection, ...]:
    """Return the selections that `spec` joins by commas; each layer chooses one of them. Of one, there is no choice.

    Raises:
        ValueError: parts that are no selections, and selections that are there twice (all listed); too many.
    """
    parts = [part.strip() for part in spec.split(",")]
    if len(parts) > MANY:
        raise ValueError(f"{len(parts)} selections are more than the {MANY} that a layer may choose among")
    selections: dict[frozenset[tuple[str, float]], TokenSelection] = {}
    problems = []
    for part in parts:
        try:
            if not part and len(parts) > 1:
                raise ValueError("nothing stands before or behind one of the commas")
            selection = TokenSelection.parse(part)
        except ValueError as error:
            problems.append(str(error))
            continue
        first = selections.setdefault(selection.meaning, selection)
        if first is not selection:
            problems.append(f"{part!r:.100} and {first.spec!r:.100} are the same selection")
    if problems:
        raise ValueError("; ".join(dict.fromkeys(problems)))
    return tuple(selections.values())


def _in_percent(part: str) -> str:
    """Return a hint for a share that is written as a fraction."""
    try:
        share = float(part)
    except ValueError:
        return ""
    return f"; a share is written in percent: {100 * share:g}%" if 0 < share <= 1 else ""


def _places(candidates: Places, per_row: bool) -> tuple[Places, Places]:
    """Return the place of each candidate in its run, from 0, and the run's length; int64 [rows, positions] each."""
    ones = candidates.astype(np.int64)
    if per_row:
        return ones.cumsum(1) - 1, np.broadcast_to(ones.sum(1, keepdims=True), ones.shape)
    before = np.zeros_like(candidates)
    before[:, 1:] = candidates[:, :-1]
    starts = candidates & ~before
    position = np.broadcast_to(np.arange(candidates.shape[1]), ones.shape)
    place = position - np.maximum.accumulate(position * starts, axis=1)
    run = starts.astype(np.int64).cumsum(1) * ones
    lengths = np.zeros((ones.shape[0], ones.shape[1] + 1), dtype=np.int64)
    np.add.at(lengths, (np.arange(len(run))[:, None], run), ones)
    return place, np.take_along_axis(lengths, run, axis=1)


def _evenly(place: Places, length: Places, count: Places) -> Places:
    """Return True where `place` is one of `count` evenly spaced places of `length`; a single one is in the middle.

    Place j of N is round(j (length - 1) / (N - 1)): the first and the last token are always among N >= 2.
    """
    count = np.minimum(count, length)
    steps, span = np.maximum(count - 1, 1), np.maximum(length - 1, 1)
    nearest = (2 * place * steps + span) // (2 * span)
    spaced = (2 * nearest * span + steps) // (2 * steps) == place
    chosen: Places = np.where(count == 1, place == length // 2, spaced & (nearest <= steps))
    return chosen


def parse_layers(spec: str, total: int | None = None) -> list[int]:
    """Return the layer numbers that `spec` names, in order.

    Args:
        spec: `all`, `7`, `0-15` or `every:2`, joined by commas.
        total: how many layers the model has; None: check the spelling only.

    Raises:
        ValueError: a part is none of the accepted forms, which the message lists, or goes beyond the last layer.
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
