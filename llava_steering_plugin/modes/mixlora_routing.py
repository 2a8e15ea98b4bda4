"""Choose r of E factors for every row of a batch, and let routers learn from it (MixLoRA, arXiv 2402.15896, sec. 3).

All in float32 and without waiting for the device. A row is an instance: a prompt with its answer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llava_steering_plugin.modes.mixlora_balance import frequency

# Half-precision hidden states are pooled in float32, this many positions at a time: a whole copy would cost memory.
POOLED_AT_ONCE = 256
# How many of the last training passes are kept for the log, for each linear.
REMEMBERED = 64


class Choice(NamedTuple):
    """The factors chosen on one side (A or B) for every row.

    Attributes:
        factors: int64 [rows, r], numbers of the factors, best first.
        probability: float32 [rows, E], the router's probability of each factor; None where it is not needed.
    """

    factors: Tensor
    probability: Tensor | None


class Routing(NamedTuple):
    """The choices on both sides: the k-th A goes with the k-th B."""

    a: Choice
    b: Choice


def masked_mean(hidden: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of hidden states over positions, float32 [rows, features].

    Args:
        hidden: [rows, positions, features] in any float dtype.
        weights: float32 [rows, positions], as `mean_weights` returns them.
    """
    if hidden.dtype == torch.float32:
        return torch.bmm(weights.unsqueeze(1), hidden).squeeze(1)
    mean = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[2], dtype=torch.float32)
    for start in range(0, hidden.shape[1], POOLED_AT_ONCE):
        part = slice(start, start + POOLED_AT_ONCE)
        mean.baddbmm_(weights[:, part].unsqueeze(1), hidden[:, part].float())
    return mean.squeeze(1)


def mean_weights(mask: Tensor) -> Tensor:
    """Return the weights of a mean over the True positions of each row, float32 [rows, positions]; zeros without any.

    Args:
        mask: bool [rows, positions].
    """
    weights = mask.float()
    return weights / weights.sum(1, keepdim=True).clamp(min=1)


def best(scores: Tensor, rank: int) -> Tensor:
    """Return the numbers of the `rank` highest scores, best first, int64 [..., rank].

    Of equal scores the lowest index wins, by a stable sort: the order that `topk` gives them depends on the device.

    Args:
        scores: float32 [..., E].
    """
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :rank]


def conditional_scores(chosen: Tensor, router: Tensor, *, released: bool) -> Tensor:
    """Return the scores of the B factors given the chosen A factors, float32 [rows, linears, E]; rows sum to 1.

    softmax( sum_i softmax(a_i . W_AB[i]) )

    Args:
        chosen: float32 [rows, linears, r, in], the A factors in order of their score.
        router: W_AB, float32 [linears, r, E, in].
        released: compute as the authors' code, which sums over `in` on each side: (sum_d a_i[d]) (sum_f W_AB[i, :, f]).
    """
    if released:
        logits = chosen.sum(3, keepdim=True) * router.sum(3)
    else:
        # The router first: its gradient then has the router's own layout, and needs no transposed copy.
        products = torch.bmm(router.flatten(0, 1), chosen.flatten(1, 2).permute(1, 2, 0))
        logits = products.permute(2, 0, 1).view(*chosen.shape[:3], -1)
    return logits.softmax(-1).sum(2).softmax(-1)


@dataclass
class Observed:
    """The choices of one side's router in the last training passes, for the log.

    Attributes:
        choices: for each pass the chosen factors, int64 [rows, r], and their probabilities, float32 [rows, E].
    """

    choices: deque[tuple[Tensor, Tensor]]

    @classmethod
    def nothing(cls) -> Observed:
        """Return a record without any pass."""
        return cls(deque(maxlen=REMEMBERED))

    def add(self, choice: Choice) -> None:
        """Note the choices of one more pass; those without probabilities are left out."""
        if choice.probability is not None:
            self.choices.append((choice.factors, choice.probability.detach()))


def mean_summary(observed: Iterable[Observed]) -> Tensor | None:
    """Return the mean over routers of two figures, float32 [2] on the CPU; start anew. None where no router has any.

    The rows' mean entropy over log E, and the number of factors in use: exp of the entropy of the frequencies, so E
    means that all are chosen alike. Routers with as many rows are summarised together, in a few operations.
    """
    alike: dict[tuple[int, torch.device], list[list[tuple[Tensor, Tensor]]]] = {}
    for one in observed:
        if one.choices:
            rows = sum(len(chosen) for chosen, _ in one.choices)
            alike.setdefault((rows, one.choices[0][0].device), []).append(list(one.choices))
            one.choices.clear()
    found = [_summaries(routers).cpu() for routers in alike.values()]
    return torch.cat(found).mean(0) if found else None


def _summaries(routers: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
    """Return both figures of routers that have chosen for equally many rows, float32 [routers, 2]."""
    passes = [each for router in routers for each in router]
    chosen = torch.cat([chosen for chosen, _ in passes]).view(len(routers), -1)
    probability = torch.cat([probability for _, probability in passes])
    factors = probability.shape[1]
    entropy = torch.special.entr(probability / probability.sum(1, keepdim=True)).sum(1)
    entropy = entropy.view(len(routers), -1).mean(1) / max(math.log(factors), 1.0)
    in_use = torch.special.entr(frequency(chosen, factors)).sum(1).exp()
    return torch.stack([entropy, in_use], 1)
