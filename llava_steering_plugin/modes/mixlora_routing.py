"""Choose r of E factors for every row of a batch, and let routers learn from it (MixLoRA, arXiv 2402.15896, sec. 3).

All in float32 and without waiting for the device. A row is an instance: a prompt with its answer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_steering_plugin.modes.base import ForwardPass
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
    mean = hidden.new_zeros(hidden.shape[0], hidden.shape[2], dtype=torch.float32)
    for start in range(0, hidden.shape[1], POOLED_AT_ONCE):
        part = slice(start, start + POOLED_AT_ONCE)
        mean += torch.bmm(weights[:, part].unsqueeze(1), hidden[:, part].float()).squeeze(1)
    return mean


def mean_weights(mask: Tensor) -> Tensor:
    """Return the weights of a mean over the True positions of each row, float32 [rows, positions]; zeros without any.

    Args:
        mask: bool [rows, positions].
    """
    weights = mask.float()
    return weights / weights.sum(1, keepdim=True).clamp(min=1)


def best(scores: Tensor, rank: int) -> Tensor:
    """Return the numbers of the `rank` highest scores of each row, best first, int64 [rows, rank].

    Of equal scores the lowest index wins, by a stable sort: the order that `topk` gives them depends on the device.

    Args:
        scores: float32 [rows, E].
    """
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :rank]


def conditional_scores(chosen: Tensor, router: Tensor, *, released: bool) -> Tensor:
    """Return the scores of the B factors given the chosen A factors, float32 [rows, E]; rows sum to 1.

    softmax( sum_i softmax(a_i . W_AB[i]) )

    Args:
        chosen: float32 [rows, r, in], the A factors in order of their score.
        router: W_AB, float32 [r, E, in].
        released: compute as the authors' code, which sums over `in` on each side: (sum_d a_i[d]) (sum_f W_AB[i, :, f]).
    """
    if released:
        logits = chosen.sum(2, keepdim=True) * router.sum(2)
    else:
        # The router first: its gradient then has the router's own layout, and needs no transposed copy.
        logits = torch.bmm(router, chosen.permute(1, 2, 0)).permute(2, 0, 1)
    return logits.softmax(-1).sum(1).softmax(-1)


class _Balanced(torch.autograd.Function):
    """Pass probabilities on unchanged; add a gradient of its own in the backward pass.

    A loss made inside a layer, but outside its output, has no gradient under reentrant checkpointing.
    """

    @staticmethod
    def forward(ctx: Any, probability: Tensor, gradient: Tensor, this_pass: ForwardPass) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.this_pass = this_pass
        return probability.view_as(probability)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (own,) = ctx.saved_tensors
        return gradient + own * ctx.this_pass.loss_scale(), None, None


def balanced(choice: Choice, coefficient: float, this_pass: ForwardPass, share: Tensor | None = None) -> Choice:
    """Return the same choice; add the gradient of  coefficient * E * sum_e f_e P_e  to its backward pass.

    f_e is the share of the choices that fell on factor e, P_e its mean probability: the load-balance loss of Switch
    Transformers (arXiv 2101.03961, eq. 4), which is 1 times the coefficient where all factors are chosen alike. The
    gradient is scaled as the loss is (`ForwardPass.loss_scale`).

    Args:
        share: f, float32 [E]; None: of the choices of this pass.
    """
    chosen, probability = choice
    if probability is None:
        return choice
    rows, factors = probability.shape
    if share is None:
        share = frequency(chosen.flatten(), factors)
    gradient = (share * (coefficient * factors / rows)).expand_as(probability)
    return Choice(chosen, _Balanced.apply(probability, gradient, this_pass))  # type: ignore[no-untyped-call]


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

    def summary(self) -> Tensor | None:
        """Return the rows' mean entropy over log E, and the number of factors in use, float32 [2]; start anew.

        The number in use is exp of the entropy of the frequencies, so E means that all are chosen alike. None without
        a training pass.
        """
        if not self.choices:
            return None
        chosen = torch.cat([chosen.flatten() for chosen, _ in self.choices])
        probability = torch.cat([probability for _, probability in self.choices])
        self.choices.clear()
        factors = probability.shape[1]
        entropy = torch.special.entr(probability).sum(1).mean() / max(math.log(factors), 1.0)
        in_use = torch.special.entr(frequency(chosen, factors)).sum().exp()
        return torch.stack([entropy, in_use])


def mean_summary(observed: Iterable[Observed]) -> Tensor | None:
    """Return the mean of all summaries, float32 [2] on the CPU; None where no router has one."""
    found = [summary.cpu() for one in observed if (summary := one.summary()) is not None]
    return torch.stack(found).mean(0) if found else None
