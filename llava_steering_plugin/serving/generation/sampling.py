"""Chooses the next token of every row of a batch, each by its own settings and with its own random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sampler:
    """Chooses the tokens of one row.

    Attributes:
        temperature: of the distribution; None: take the likeliest token.
        top_p: choose among the likeliest tokens that have this probability together.
        top_k: choose among as many of the likeliest tokens; 0: among all.
        seed: of the row's own random numbers; None: unknown ones.
    """

    temperature: float | None
    top_p: float
    top_k: int
    seed: int | None
    _numbers: torch.Generator | None = None

    def choose(self, scores: Tensor) -> Tensor:
        """Return the next token, int64 [], from float [vocabulary] scores.

        It depends on nothing but these scores, the settings and the tokens drawn before.
        """
        if self.temperature is None:
            return scores.argmax()
        size = scores.numel()
        values, ids = torch.topk(scores.float() / self.temperature, min(self.top_k or size, size))
        shares = values.softmax(0)
        # The likeliest is always kept, and the one with which the sum passes top_p.
        shares = shares.masked_fill(shares.cumsum(0) - shares >= max(self.top_p, torch.finfo(shares.dtype).tiny), 0)
        return ids[torch.multinomial(shares, 1, generator=self._generator(scores.device))[0]]

    def _generator(self, device: torch.device) -> torch.Generator:
        if self._numbers is None:
            self._numbers = torch.Generator(device)
            if self.seed is None:
                self._numbers.seed()
            else:
                self._numbers.manual_seed(self.seed % (1 << 63))  # it takes 64 bits
        return self._numbers


def choose_tokens(samplers: Sequence[Sampler | None], scores: Tensor, broken: Tensor) -> Tensor:
    """Return the next token of each row, int64 [rows].

    Args:
        samplers: None for rows that have ended, whose token does not matter.
        scores: float [rows, vocabulary].
        broken: bool [rows], True where the scores are not finite; nothing can be sampled there.
    """
    chosen = scores.argmax(-1)
    sampled = [row for row, sampler in enumerate(samplers) if sampler is not None and sampler.temperature is not None]
    if sampled:
        safe = torch.where(broken.unsqueeze(1), 0.0, scores)
        for row in sampled:
            chosen[row] = samplers[row].choose(safe[row])  # type: ignore[union-attr]
    return chosen
