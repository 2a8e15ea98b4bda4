"""Choose and take factors for linears that are called on one tensor, all at once (MixLoRA, arXiv 2402.15896, sec. 3).

They share what depends on that tensor: the pooled prompt, the products of all routers with it, one softmax and one sort
for each side, and the products with all chosen A factors. Each linear for itself is the case of one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_steering_plugin.modes.base import ForwardPass
from llava_steering_plugin.modes.mixlora_balance import PassBalance, Tally
from llava_steering_plugin.modes.mixlora_factors import Gates, narrowed
from llava_steering_plugin.modes.mixlora_routing import (
    Choice,
    Observed,
    Routing,
    best,
    conditional_scores,
    masked_mean,
    mean_weights,
)
from llava_steering_plugin.modes.mixlora_settings import PROMPT, RELEASED, MixLoRASettings
from llava_steering_plugin.modes.mixlora_steps import Kept, kept_step


class Routed(Hashable, Protocol):
    """A linear with factors and routers; `mixlora.RoutedLinear` documents them."""

    training: bool
    learns: bool
    balance: float
    routed_a: nn.Parameter
    routed_b: nn.Parameter
    router_a: nn.Parameter
    router_b: nn.Parameter
    router_ab: nn.Parameter
    dropout: nn.Dropout
    observed: tuple[Observed, Observed]
    tallies: tuple[Tally, Tally]

    @property
    def mode(self) -> MixLoRASettings: ...

    @property
    def together(self) -> object: ...

    def instead(self, hidden: Tensor, this_pass: ForwardPass) -> Routing | None: ...

    def shares(self, tallies: Sequence[Tally], choices: Tensor) -> Tensor: ...


@dataclass(eq=False)
class Shared:
    """Holds what linears share that are called on one tensor.

    Attributes:
        linears: in the order of their calls.
        hidden: what they are called on, [rows, positions, in], in the dtype of the update.
        a: chosen factors of all of them, [rows, linears * r, in].
        b: chosen factors of each, without the scale, [rows, r, out].
        gates: of all of them; None where no router learns.
    """

    linears: Sequence[Routed]
    hidden: Tensor
    a: Tensor
    b: Mapping[Routed, Tensor]
    gates: Gates | None = None
    _narrow: tuple[Tensor, dict[Routed, Tensor]] | None = None

    def narrow_of(self, linear: Routed) -> tuple[Tensor, Tensor]:
        """Return the hidden states to go on with, and their products with a linear's A, [rows, r, positions]."""
        rank = linear.mode.rank
        if linear.training and linear.dropout.p:  # each linear drops other elements of its input
            place = self.linears.index(linear)
            gates = None if self.gates is None else self.gates.of(place)
            return narrowed(linear.dropout(self.hidden), self.a.narrow(1, place * rank, rank), gates)
        if self._narrow is None:
            hidden, narrow = narrowed(self.hidden, self.a, self.gates)
            parts = torch.split(narrow, rank, 1) if len(self.linears) > 1 else (narrow,)
            self._narrow = hidden, dict(zip(self.linears, parts, strict=True))
        return self._narrow[0], self._narrow[1][linear]


def shared(linears: Sequence[Routed], hidden: Tensor, this_pass: ForwardPass, dtype: torch.dtype) -> Shared:
    """Choose factors for linears that are called on `hidden`, or find those that the prefill has chosen.

    Args:
        linears: the first of them is being called.
        hidden: [rows, positions, in].
        dtype: to compute the update in.

    Raises:
        TokenMapError: a decode step has no prefill.
    """
    mode = linears[0].mode
    if this_pass.decode and mode.pooling == PROMPT:
        prefilled = [linear for linear in linears if linear in this_pass.kept] or linears[:1]
        step = kept_step(prefilled, this_pass, len(hidden), dtype)
        return Shared(prefilled, hidden.to(dtype), step.a, step.b)
    routing = linears[0].instead(hidden, this_pass)
    if routing is None:
        gates, a = chosen(linears, hidden, this_pass)
    else:
        gates, a = forced(linears[0], routing)
    b = {}
    for number, linear in enumerate(linears):
        of_a, of_b = (side[:, number] for side in gates.chosen)
        this_pass.kept[linear] = Kept(of_a, of_b)
        b[linear] = F.embedding(of_b, linear.routed_b).to(dtype)
    learning = linears[0].learns and torch.is_grad_enabled() and routing is None
    return Shared(linears, hidden.to(dtype), a.flatten(1, 2).to(dtype), b, gates if learning else None)


def chosen(linears: Sequence[Routed], hidden: Tensor, this_pass: ForwardPass) -> tuple[Gates, Tensor]:
    """Choose r factors on each side, for every linear and row; return the choice, and A [rows, linears, r, in]."""
    first, count = linears[0], len(linears)
    mode = first.mode
    routers, routers_ab, pools = _stacked(linears)
    if not first.learns:
        routers, routers_ab = routers.detach(), None if routers_ab is None else routers_ab.detach()
    with torch.no_grad():
        # The routers learn from the hidden states; the hidden states get no gradient from the routers.
        pooled = masked_mean(hidden, _pooling_weights(mode, hidden, this_pass))
    logits = F.linear(pooled, routers).view(-1, 2, count, mode.factors)
    if first.training and mode.noise:
        logits = logits + mode.noise * torch.randn_like(logits)
    scores_a, scores_b = logits.softmax(-1).unbind(1)
    logits_a, order_b = logits.detach().unbind(1)
    chosen_a = best(logits_a, mode.rank)
    a = F.embedding(_numbered(chosen_a, mode.factors, this_pass), pools)
    share = 1.0
    if routers_ab is not None:
        given_a = conditional_scores(a.detach().float(), routers_ab, released=mode.variant == RELEASED)
        scores_b = torch.add(scores_b, given_a, alpha=mode.ifs_weight)
        order_b, share = scores_b.detach(), 1 / (1 + mode.ifs_weight)
    chosen_b = best(order_b, mode.rank)
    _note(linears, (chosen_a, chosen_b), (scores_a, scores_b), this_pass)
    balance = None
    if first.balance:
        balance = this_pass.once(("mixlora balance", first.together), PassBalance)
        balance.note(linears, (chosen_a, chosen_b))
    return Gates(
        (chosen_a, chosen_b),
        (scores_a, scores_b),
        (1.0, share),
        None if balance is None else lambda: balance.gradient(linears, this_pass),
    ), a


def _note(
    linears: Sequence[Routed], factors: tuple[Tensor, Tensor], scores: tuple[Tensor, Tensor], this_pass: ForwardPass
) -> None:
    """Note the choices for the log, once a pass: gradient checkpointing chooses the same again."""
    if not linears[0].training:
        return
    noted: set[Routed] = this_pass.once(("mixlora observed", linears[0].together), set)
    for number, linear in enumerate(linears):
        if linear not in noted:
            noted.add(linear)
            for observed, chosen, score in zip(linear.observed, factors, scores, strict=True):
                observed.add(Choice(chosen[:, number], score.detach()[:, number]))


def forced(linear: Routed, routing: Routing) -> tuple[Gates, Tensor]:
    """Return a choice that was made elsewhere for one linear as `chosen` does."""
    of_a, of_b = (choice.factors.unsqueeze(1) for choice in routing)
    return Gates((of_a, of_b), (of_a, of_b), (1.0, 1.0), None), F.embedding(of_a, linear.routed_a)


def _stacked(linears: Sequence[Routed]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return all routers [2 * linears * E, in], W_AB [linears, r, E, in] and the A factors [linears * E, in], float32.

    Of several linears they come out of one copy; of one, only the routers are copied.
    """
    routers: list[Tensor] = [*(linear.router_a for linear in linears), *(linear.router_b for linear in linears)]
    first, count = linears[0], len(linears)
    rank, factors = first.mode.rank, first.mode.factors
    if count == 1:
        routers_ab = first.router_ab.float().unsqueeze(0) if first.mode.conditional else None
        return torch.cat(routers).float(), routers_ab, first.routed_a
    of_ab = [linear.router_ab.flatten(0, 1) for linear in linears] if first.mode.conditional else []
    copied = torch.cat([*routers, *(linear.routed_a for linear in linears), *of_ab]).float()
    sizes = [2 * count * factors, count * factors, *([count * rank * factors] if of_ab else [])]
    all_routers, pools, *rest = torch.split(copied, sizes)
    return all_routers, rest[0].view(count, rank, factors, -1) if rest else None, pools


def _numbered(factors: Tensor, of: int, this_pass: ForwardPass) -> Tensor:
    """Return the numbers of chosen factors, int64 [rows, linears, r], in the linears' pools one below the other."""
    count = factors.shape[1]
    if count == 1:
        return factors
    key = ("mixlora offsets", count, of, factors.device)
    return factors + this_pass.once(key, lambda: torch.arange(0, count * of, of, device=factors.device).unsqueeze(1))


def _pooling_weights(mode: MixLoRASettings, hidden: Tensor, this_pass: ForwardPass) -> Tensor:
    def of_prompt() -> Tensor:
        return mean_weights(this_pass.prompt.to(hidden.device))

    if mode.pooling == PROMPT:
        return this_pass.once(("mixlora", PROMPT, hidden.device), of_prompt)
    return hidden.new_full(hidden.shape[:2], 1 / hidden.shape[1], dtype=torch.float32)
