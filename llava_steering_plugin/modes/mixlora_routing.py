"""Choosing r of E factors for every row of a batch, and how routers learn from it (MixLoRA, arXiv 2402.15896, sec. 3).

All in float32 and without waiting for a device. A row is an instance: a prompt with its answer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llava_steering_plugin.modes.base import ForwardPass

# Half-precision hidden states are pooled in float32 by as many positions at a time: a whole copy would cost memory.
POOLED_AT_ONCE = 256
# Passes whose choices are kept for the log, per linear.
REMEMBERED = 64


class Choice(NamedTuple):
    """The factors chosen on one side (A or B) for every row.

    Attributes:
        factors: int64 [rows, r], their numbers, best first.
        probability: float32 [rows, E], what the router gives each factor; None where nobody asked for it.
    """

    factors: Tensor
    probability: Tensor | None


class Routing(NamedTuple):
    """The choices on both sides: the k-th A goes with the k-th B."""

    a: Choice
    b: Choice


def masked_mean(hidden: Tensor, weights: Tensor) -> Tensor:
    """Float32 [rows, features]: the sum over positions of `hidden` [rows, positions, features] times `weights`.

    Args:
        hidden: any float dtype.
        weights: float32 [rows, positions], as `mean_weights` gives them.
    """
    if hidden.dtype == torch.float32:
        return torch.bmm(weights.unsqueeze(1), hidden).squeeze(1)
    mean = hidden.new_zeros(hidden.shape[0], hidden.shape[2], dtype=torch.float32)
    for start in range(0, hidden.shape[1], POOLED_AT_ONCE):
        part = slice(start, start + POOLED_AT_ONCE)
        mean += torch.bmm(weights[:, part].unsqueeze(1), hidden[:, part].float()).squeeze(1)
    return mean


def mean_weights(mask: Tensor) -> Tensor:
    """Float32 weights that make a mean over the True positions of each row; a row without any gets zeros."""
    weights = mask.float()
    return weights / weights.sum(1, keepdim=True).clamp(min=1)


def best(scores: Tensor, rank: int) -> Tensor:
    """int64 [rows, rank]: the highest scores of each row, best first; of equal ones, the lowest index.

    `topk` leaves the order of equal scores to the device; a stable sort does not.
    """
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :rank]


def conditional_scores(chosen: Tensor, router: Tensor, *, released: bool) -> Tensor:
    """float32 [rows, E], rows sum to 1: what the chosen A factors say about which B factors to take.

    softmax( sum_i softmax(a_i . W_AB[i]) )

    Args:
        chosen: float32 [rows, r, in], the A factors in order of their score.
        router: W_AB, float32 [r, E, in].
        released: as the authors' code, which sums `in` out on both sides apart: (sum_d a_i[d]) (sum_f W_AB[i, :, f]).
    """
    if released:
        logits = chosen.sum(2, keepdim=True) * router.sum(2)
    else:
        # The router first: its gradient then comes in the router's own layout, and no transposed copy is made of it.
        logits = torch.bmm(router, chosen.permute(1, 2, 0)).permute(2, 0, 1)
    return logits.softmax(-1).sum(1).softmax(-1)


class _Balanced(torch.autograd.Function):
    """The identity on probabilities; adds a gradient of its own in the backward pass.

    A loss made inside a layer, but outside its output, has no gradient under reentrant checkpointing.
    """

    @staticmethod
    def forward(ctx: Any, probability: Tensor, gradient: Tensor, this_pass: ForwardPass) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.this_pass = this_pass
        return probability.view_as(probability)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (own,) = ctx.saved_tensors
        return gradient + own * ctx.this_pass.loss_scale(), None, None


def balanced(choice: Choice, coefficient: float, this_pass: ForwardPass) -> Choice:
    """The same choice; adds the load-balance loss  coefficient * E * sum_e f_e P_e  to the backward pass.

    f_e is the share of the batch's choices that fell on factor e, P_e its mean probability (Switch Transformers, arXiv
    2101.03961, eq. 4). It is 1 times the coefficient where all factors are chosen alike.
    """
    chosen, probability = choice
    if probability is None:
        return choice
    rows, factors = probability.shape
    share = _frequency(chosen.flatten(), factors)
    gradient = (share * (coefficient * factors / rows)).expand_as(probability)
    return Choice(chosen, _Balanced.apply(probability, gradient, this_pass))  # type: ignore[no-untyped-call]


def _frequency(chosen: Tensor, factors: int) -> Tensor:
    """float32 [factors]: the share of `chosen`, int64 [choices], that each factor has."""
    ones = torch.ones(chosen.shape, device=chosen.device)
    return ones.new_zeros(factors).index_add_(0, chosen, ones) / len(ones)


@dataclass
class Observed:
    """What one side's router did in the last training passes, for the log."""

    choices: deque[tuple[Tensor, Tensor]]

    @classmethod
    def nothing(cls) -> Observed:
        return cls(deque(maxlen=REMEMBERED))

    def add(self, choice: Choice) -> None:
        if choice.probability is not None:
            self.choices.append((choice.factors, choice.probability.detach()))

    def summary(self) -> Tensor | None:
        """float32 [2]: mean entropy of a row's probabilities, over log E; how many factors are in use, of E.

        Factors in use: exp of the entropy of how often each was chosen, so that E means all alike. Forgets what it
        summed up. None without training passes.
        """
        if not self.choices:
            return None
        chosen = torch.cat([chosen.flatten() for chosen, _ in self.choices])
        probability = torch.cat([probability for _, probability in self.choices])
        self.choices.clear()
        factors = probability.shape[1]
        entropy = torch.special.entr(probability).sum(1).mean() / max(math.log(factors), 1.0)
        in_use = torch.special.entr(_frequency(chosen, factors)).sum().exp()
        return torch.stack([entropy, in_use])


def mean_summary(observed: Iterable[Observed]) -> Tensor | None:
    """The mean of the summaries that there are, on the CPU."""
    found = [summary.cpu() for one in observed if (summary := one.summary()) is not None]
    return torch.stack(found).mean(0) if found else None
