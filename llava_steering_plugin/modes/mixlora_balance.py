"""Measure over a whole optimizer step how often MixLoRA's routers choose each factor (after arXiv 2501.11873).

The load-balance loss  E * sum_e f_e P_e  wants the shares f of many rows: one or two say nothing. P_e needs only the
rows at hand, because gradients add up over the passes of a step; f takes no gradient, so it may come from other passes:

    f = 1/n * (shares of this pass) + (1 - 1/n) * (shares of the step before, all ranks)

for a step of n passes: accumulated micro-batches times ranks. The other passes of the same step are not known yet, or
are on other ranks; the router has hardly changed since the step before. So it makes no difference whether passes are
accumulated or on ranks, and no rank waits for another within a step. With n = 1, f is the pass's own shares.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from llava_steering_plugin.modes.base import ForwardPass, StepStatistics
from llava_steering_plugin.modes.mixlora_together import Together

# In a state, beside the names of routers, which have a dot.
TOGETHER = "together"


def frequency(chosen: Tensor, factors: int) -> Tensor:
    """Return the share that each factor has of `chosen`, int64 [routers, choices]; float32 [routers, factors]."""
    return _counts(chosen, factors) / chosen.shape[1]


def _counts(chosen: Tensor, factors: int) -> Tensor:
    ones = torch.ones(chosen.shape, dtype=torch.float32, device=chosen.device)
    return ones.new_zeros(len(chosen), factors).scatter_add_(1, chosen, ones)


class Tally:
    """Counts the choices of one side's router over the passes of a step.

    Args:
        factors: E.

    Attributes:
        passes_in_step: n; 1 unless a training says otherwise.
        seen: the counts of each pass of this step so far, float32 [E] each.
        before: the shares of the step before, float32 [E], the same on every rank; None in the first step.
    """

    def __init__(self, factors: int):
        self.factors, self.passes_in_step = factors, 1
        self.seen: list[Tensor] = []
        self.before: Tensor | None = None

    @property
    def counts(self) -> Tensor | None:
        """Return the counts of this step so far, float32 [E]; None before its first pass."""
        return torch.stack(self.seen).sum(0) if self.seen else None

    def end_step(self, shares: Tensor | None) -> None:
        """Begin the next step.

        Args:
            shares: of this step on all ranks, float32 [E]; None if no rank has chosen anything.
        """
        if shares is not None:
            self.before = shares
        self.seen = []


def shares(tallies: Sequence[Tally], chosen: Tensor, *, counted: bool) -> Tensor:
    """Return f of several routers of one training for a pass, float32 [routers, E].

    Args:
        tallies: of the routers.
        chosen: the factors that they chose in the pass, int64 [routers, choices].
        counted: the pass belongs to a step; otherwise it gets its own shares, and none later remembers it.
    """
    passes = tallies[0].passes_in_step
    counts = _counts(chosen, tallies[0].factors)
    own = counts / chosen.shape[1]
    if passes == 1 or not counted:
        return own
    for tally, row in zip(tallies, counts, strict=True):
        tally.seen.append(row)
    each = zip(tallies, own, strict=True)
    before = torch.stack([row if tally.before is None else tally.before.to(row.device) for tally, row in each])
    return torch.lerp(before, own, 1 / passes)


class Balanced(Hashable, Protocol):
    """A linear with two routers, on the sides of A and of B, whose choices are balanced."""

    balance: float
    tallies: tuple[Tally, Tally]

    def shares(self, tallies: Sequence[Tally], choices: Tensor) -> Tensor: ...


class PassBalance:
    """Makes the gradient of the load-balance loss of all routers of a pass at once, in its backward pass.

        coefficient * E * sum_e f_e P_e

    f_e is the share of the choices that fell on factor e, P_e its mean probability: the loss of Switch Transformers
    (arXiv 2101.03961, eq. 4), which is 1 times the coefficient where all factors are chosen alike. A loss made inside a
    layer, but outside its output, would have no gradient under reentrant checkpointing. The gradient is scaled as the
    loss is (`ForwardPass.loss_scale`).
    """

    def __init__(self) -> None:
        self._chosen: dict[Balanced, tuple[Tensor, Tensor]] = {}
        self._gradients: dict[Balanced, tuple[Tensor, int]] = {}

    def note(self, linears: Sequence[Balanced], chosen: tuple[Tensor, Tensor]) -> None:
        """Note the choices of linears, int64 [rows, linears, r] for each side; a recomputation makes the same again."""
        for number, linear in enumerate(linears):
            self._chosen.setdefault(linear, (chosen[0][:, number], chosen[1][:, number]))

    def gradient(self, linears: Sequence[Balanced], this_pass: ForwardPass) -> Tensor:
        """Return the gradient of the linears' P, float32 [2, rows or 1, linears, E]; call it in the backward pass.

        Args:
            linears: that were noted together.
        """
        if linears[0] not in self._gradients:
            noted = [linear for linear in self._chosen if linear not in self._gradients]
            # In a backward pass that is to be differentiated, too.
            with torch.no_grad():
                made = self._made(noted, this_pass)
            self._gradients |= {linear: (made, number) for number, linear in enumerate(noted)}
        made, number = self._gradients[linears[0]]
        return made[number : number + len(linears)].permute(1, 2, 0, 3)

    def _made(self, linears: Sequence[Balanced], this_pass: ForwardPass) -> Tensor:
        """Return the gradients of linears, float32 [linears, 2, rows or 1, E]."""
        choices = torch.stack([side for linear in linears for side in self._chosen[linear]])
        tallies = [tally for linear in linears for tally in linear.tallies]
        found = linears[0].shares(tallies, choices)
        scale = linears[0].balance * found.shape[-1] / choices.shape[1] * this_pass.loss_scale()
        return (found * scale).view(len(linears), 2, -1, found.shape[-1])


class BalanceOverSteps(StepStatistics):
    """Leads the tallies of all routers through a training.

    Args:
        tallies: by a name that stays the same when the training is resumed.
        together: which linears are called on one tensor; None: each works alone.
        names: of the linears in it, which stay the same too.
    """

    def __init__(
        self,
        tallies: Mapping[str, Tally],
        together: Together[Any] | None = None,
        names: Mapping[Any, str] | None = None,
    ):
        self.tallies, self.together, self.names = tallies, together, names or {}

    def begin(self, passes: int) -> None:
        for tally in self.tallies.values():
            tally.passes_in_step = passes

    def end_step(self, add_up: Callable[[Tensor], Tensor]) -> None:
        tallies = list(self.tallies.values())
        if not tallies or tallies[0].passes_in_step == 1:
            return
        # One tensor of one shape, whatever a rank has seen: every rank adds up once a step, and none waits for another.
        counts = add_up(_added_up(tallies))
        totals = counts.sum(1, keepdim=True)
        for tally, shares, total in zip(tallies, counts / totals.clamp(min=1), totals.flatten().tolist(), strict=True):
            tally.end_step(shares if total else None)

    def state(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        if self.together is not None:
            # The first pass of a training finds it out, and sums gradients in another order than later ones.
            found[TOGETHER] = self.together.state(self.names)
        return found | {name: each.before.tolist() for name, each in self.tallies.items() if each.before is not None}

    def load(self, state: Mapping[str, list[Any]]) -> None:
        if self.together is not None:
            self.together.load(state.get(TOGETHER, ()), self.names)
        for name, tally in self.tallies.items():
            tally.before = torch.tensor(state[name]) if len(state.get(name, ())) == tally.factors else None


def _added_up(tallies: Sequence[Tally]) -> Tensor:
    """Return the counts of all passes of a step, float32 [tallies, E]."""
    device = next((each.seen[0].device for each in tallies if each.seen), torch.device("cpu"))
    passes = max(len(each.seen) for each in tallies)
    none = torch.zeros(tallies[0].factors, device=device)
    rows = [row.to(device) for each in tallies for row in (*each.seen, *[none] * (passes - len(each.seen)))]
    return torch.stack(rows).view(len(tallies), passes, -1).sum(1) if passes else none.expand(len(tallies), -1)
