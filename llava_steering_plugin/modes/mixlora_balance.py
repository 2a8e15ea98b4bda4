"""Measure over a whole optimizer step how often MixLoRA's routers choose each factor (after arXiv 2501.11873).

The load-balance loss  E * sum_e f_e P_e  wants the shares f of many rows: one or two say nothing. P_e needs only the
rows at hand, because gradients add up over the passes of a step; f takes no gradient, so it may come from other passes:

    f = 1/n * (shares of this pass) + (1 - 1/n) * (shares of the step before, all ranks)

for a step of n passes: accumulated micro-batches times ranks. The other passes of the same step are not known yet, or
are on other ranks; the router has hardly changed since the step before. So it makes no difference whether passes are
accumulated or on ranks, and no rank waits for another within a step. With n = 1, f is the pass's own shares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llava_steering_plugin.modes.base import StepStatistics


def frequency(chosen: Tensor, factors: int) -> Tensor:
    """Return the share that each factor has of `chosen`, int64 [choices]; float32 [factors]."""
    return _counts(chosen, factors) / len(chosen)


def _counts(chosen: Tensor, factors: int) -> Tensor:
    ones = torch.ones(chosen.shape, dtype=torch.float32, device=chosen.device)
    return ones.new_zeros(factors).index_add_(0, chosen, ones)


class Tally:
    """Counts the choices of one side's router over the passes of a step.

    Args:
        factors: E.

    Attributes:
        passes_in_step: n; 1 unless a training says otherwise.
        counts: of this step so far, float32 [E]; None before its first pass.
        before: the shares of the step before, float32 [E], the same on every rank; None in the first step.
    """

    def __init__(self, factors: int):
        self.factors, self.passes_in_step = factors, 1
        self.counts: Tensor | None = None
        self.before: Tensor | None = None

    def shares(self, chosen: Tensor, *, counted: bool) -> Tensor:
        """Return f for a pass that chose `chosen`, int64 [rows, r]; float32 [E].

        Args:
            counted: the pass belongs to a step; otherwise it gets its own shares, and none later remembers it.
        """
        counts = _counts(chosen.flatten(), self.factors)
        own = counts / chosen.numel()
        if self.passes_in_step == 1 or not counted:
            return own
        self.counts = counts if self.counts is None else self.counts + counts
        if self.before is None:
            return own
        return torch.lerp(self.before.to(own.device), own, 1 / self.passes_in_step)

    def end_step(self, shares: Tensor | None) -> None:
        """Begin the next step.

        Args:
            shares: of this step on all ranks, float32 [E]; None if no rank has chosen anything.
        """
        if shares is not None:
            self.before = shares
        self.counts = None


class BalanceOverSteps(StepStatistics):
    """Leads the tallies of all routers through a training.

    Args:
        tallies: by a name that stays the same when the training is resumed.
    """

    def __init__(self, tallies: Mapping[str, Tally]):
        self.tallies = tallies

    def begin(self, passes: int) -> None:
        for tally in self.tallies.values():
            tally.passes_in_step = passes

    def end_step(self, add_up: Callable[[Tensor], Tensor]) -> None:
        tallies = list(self.tallies.values())
        if not tallies or tallies[0].passes_in_step == 1:
            return
        # One tensor of one shape, whatever a rank has seen: every rank adds up once a step, and none waits for another.
        device = next((each.counts.device for each in tallies if each.counts is not None), torch.device("cpu"))
        none = torch.zeros(tallies[0].factors, device=device)
        counts = add_up(torch.stack([none if each.counts is None else each.counts.to(device) for each in tallies]))
        totals = counts.sum(1, keepdim=True)
        for tally, shares, total in zip(tallies, counts / totals.clamp(min=1), totals.flatten().tolist(), strict=True):
            tally.end_step(shares if total else None)

    def state(self) -> dict[str, list[float]]:
        return {name: tally.before.tolist() for name, tally in self.tallies.items() if tally.before is not None}

    def load(self, state: Mapping[str, list[float]]) -> None:
        for name, tally in self.tallies.items():
            tally.before = torch.tensor(state[name]) if len(state.get(name, ())) == tally.factors else None
