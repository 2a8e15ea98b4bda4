"""Choose the samples that take the places of bad ones, by (seed, sample) alone.

So a resumed run, another number of ranks and another number of loader workers see the same batches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np


class StandIns:
    """Lists, for every sample, which others may take its place, the first choice first.

    Args:
        seed: of the training's data.
        entries: of the data file.
    """

    def __init__(self, seed: int, entries: Sequence[Any]):
        self.seed = seed
        # An array, not a list: every worker process of the data loader has a copy.
        self.pictured = np.fromiter(
            (isinstance(entry, Mapping) and "image" in entry for entry in entries), bool, len(entries)
        )

    def of(self, number: int) -> Iterator[int]:
        """Yield all other samples in the order of choice: those with an image first if this one has one, or else last.

        LLaVA puts samples with and without images into batches of their own.
        """
        with_image = bool(self.pictured[number])
        for kind in (with_image, not with_image):
            pool = np.flatnonzero(self.pictured == kind)
            for place in self._all_places(number, len(pool)):
                if pool[place] != number:
                    yield int(pool[place])

    def _all_places(self, number: int, count: int) -> Iterator[int]:
        """Yield the numbers below `count` once each, from a place and in steps that depend on (seed, number)."""
        if not count:
            return
        digest = hashlib.sha256(f"{self.seed}:{number}".encode()).digest()
        start = int.from_bytes(digest[:8], "big") % count
        step = 1 + int.from_bytes(digest[8:16], "big") % count
        while math.gcd(step, count) != 1:
            step += 1
        for place in range(count):
            yield (start + place * step) % count
