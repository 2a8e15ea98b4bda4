"""MixLoRA: low-rank factors that are chosen for every instance (arXiv 2402.15896).

    y = base(x) + (alpha/r) (x A^T) B,   A = r of E factors a_e in R^in,   B = r of E factors b_e in R^out

Independent selection (IFS): A by the scores  W_A mean(x),  B by  W_B mean(x). Conditional selection (CFS): B by

    softmax(W_B mean(x)) + w softmax( sum_i softmax(a_i . W_AB[i]) ),   a_1 ... a_r the chosen A factors.

The k-th A goes with the k-th B, in order of score. Chosen once for each row; never a [rows, in, out] tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from llava_steering_plugin.errors import TokenMapError
from llava_steering_plugin.modes.base import DecoderShape, ForwardPass, Mode, no_autocast, setting
from llava_steering_plugin.modes.mixlora_factors import entrance, take, updated
from llava_steering_plugin.modes.mixlora_routing import (
    Choice,
    Observed,
    Routing,
    balanced,
    best,
    conditional_scores,
    masked_mean,
    mean_summary,
    mean_weights,
)
from llava_steering_plugin.modes.mixlora_targets import ALL, find_targets, parse_targets

PROMPT, SEQUENCE = "prompt", "sequence"
STRAIGHT_THROUGH, NO_GRADIENT = "straight_through", "none"
PAPER, RELEASED = "paper", "released"
BALANCE = 0.05


class RoutedLinear(nn.Module):
    """The update of one linear: pools of factors on both sides, and the routers that choose from them.

    Parameters, float32 (in brackets, what the authors' checkpoints call them below the linear's name):
        routed_a [E, in]: the A factors (lora_A.default.0 ... E-1, [1, in] each).
        routed_b [E, out]: the B factors, zero at first (lora_B.default.0 ... E-1, [1, out] each).
        router_a [E, in]: W_A (cmoa_selector.loraA_selector.weight).
        router_b [E, in]: W_B (cmoa_selector.loraB_selector.weight; with conditional selection
            cmoa_loarB_extra_selector.loraB_selector.weight).
        router_ab [r, E, in]: W_AB, with conditional selection only (cmoa_loarB_extra_selector.
            loraA_param2loraB_selector.weight [E, r * in] = router_ab.transpose(0, 1).reshape(E, r * in)).

    Args:
        in_features, out_features: of the linear.
        mode: the settings.
        balance: weight of this linear's load-balance loss, on each side.

    Shapes:
        output: [rows, positions, out] in any float dtype, which the update is computed in; the routers in float32. It
            is written into.
        inputs: [rows, positions, in], or both with rows and positions flattened into one.
    """

    def __init__(self, in_features: int, out_features: int, mode: MixLoRA, balance: float = 0.0):
        super().__init__()
        self.mode, self.balance = mode, balance
        self.learns = mode.router_learns
        factors = mode.factors
        self.routed_a = nn.Parameter(torch.empty(factors, in_features))
        self.routed_b = nn.Parameter(torch.zeros(factors, out_features))
        self.router_a = nn.Parameter(torch.empty(factors, in_features), requires_grad=self.learns)
        self.router_b = nn.Parameter(torch.empty(factors, in_features), requires_grad=self.learns)
        if mode.conditional:
            self.router_ab = nn.Parameter(torch.empty(mode.rank, factors, in_features), requires_grad=self.learns)
        for name, parameter in self.named_parameters():
            if name != "routed_b":
                # As nn.Linear's: kaiming_uniform with a = sqrt(5).
                nn.init.uniform_(parameter, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))
        self.dropout = nn.Dropout(mode.dropout)
        self.observed = (Observed.nothing(), Observed.nothing())

    def enter(self, inputs: Tensor) -> Tensor:
        """What the linear is to be called on in place of `inputs`, the same numbers."""
        return entrance(inputs)

    def forward(self, output: Tensor, inputs: Tensor, this_pass: ForwardPass) -> Tensor:
        rows, positions = this_pass.prompt.shape
        if inputs.shape[:-1] not in ((rows, positions), (rows * positions,)):
            raise TokenMapError(
                f"a linear of the decoder got {list(inputs.shape)} where the pass has {[rows, positions]} rows and "
                "positions, so MixLoRA cannot tell whose tokens these are (experts of a mixture get them so). Leave "
                "such linears out with --mixlora_targets."
            )
        if inputs.dim() == 2:
            by_rows = output.reshape(rows, positions, -1), inputs.reshape(rows, positions, -1)
            return self._updated(by_rows[0], by_rows[1], this_pass).view_as(output)
        return self._updated(output, inputs, this_pass)

    def _updated(self, output: Tensor, inputs: Tensor, this_pass: ForwardPass) -> Tensor:
        # No views here: autograd adds the base's gradient into the one that `updated` gives if nothing else refers to
        # it, and else takes a third tensor of the input's size for the sum.
        with no_autocast(output.device):
            a, b = self.factors_for(inputs, this_pass, output.dtype)
            return updated(output, self.dropout(inputs.to(output.dtype)), a, b)

    def factors_for(self, hidden: Tensor, this_pass: ForwardPass, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [rows, r, in] and B [rows, r, out] of `dtype` for `hidden` [rows, positions, in], B times alpha / r."""
        if this_pass.decode and self.mode.pooling == PROMPT:
            return self._kept_factors(this_pass, len(hidden), dtype)
        routing = self.route(hidden, this_pass)
        this_pass.kept[self] = _Kept(routing.a.factors, routing.b.factors)
        return self._factors(routing, dtype)

    def route(self, hidden: Tensor, this_pass: ForwardPass) -> Routing:
        """Chooses factors for every row from its `hidden` [rows, positions, in]."""
        with torch.no_grad():
            # Routers learn from where the hidden states are; these do not learn to be routed.
            pooled = masked_mean(hidden, self._pooling_weights(hidden, this_pass))
        learning = self.learns and torch.is_grad_enabled()
        watched = learning or self.training
        logits_a, logits_b = (self._logits(pooled, router) for router in (self.router_a, self.router_b))
        a = Choice(best(logits_a.detach(), self.mode.rank), logits_a.softmax(-1) if watched else None)
        if self.mode.conditional:
            with torch.no_grad():
                chosen = self.routed_a.float()[a.factors]
            given_a = conditional_scores(chosen, self.router_ab.float(), released=self.mode.variant == RELEASED)
            scores = logits_b.softmax(-1) + self.mode.ifs_weight * given_a
            probability = scores / (1 + self.mode.ifs_weight) if watched else None
        else:
            scores = logits_b
            probability = logits_b.softmax(-1) if watched else None
        b = Choice(best(scores.detach(), self.mode.rank), probability)
        if self.training:
            for observed, choice in zip(self.observed, (a, b), strict=True):
                observed.add(choice)
        if learning and self.balance:
            a, b = balanced(a, self.balance, this_pass), balanced(b, self.balance, this_pass)
        return Routing(a, b)

    def _pooling_weights(self, hidden: Tensor, this_pass: ForwardPass) -> Tensor:
        def of_prompt() -> Tensor:
            return mean_weights(this_pass.prompt.to(hidden.device))

        if self.mode.pooling == PROMPT:
            return this_pass.once(("mixlora", PROMPT, hidden.device), of_prompt)
        return hidden.new_full(hidden.shape[:2], 1 / hidden.shape[1], dtype=torch.float32)

    def _logits(self, pooled: Tensor, router: Tensor) -> Tensor:
        logits = nn.functional.linear(pooled, router.float())
        if self.training and self.mode.noise:
            logits = logits + self.mode.noise * torch.randn_like(logits)
        return logits

    def _factors(self, routing: Routing, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # The scale goes with B, which is small: half precision ends soon.
        gated = self.learns and torch.is_grad_enabled()
        a = take(self.routed_a, routing.a, dtype, gated=gated)
        return a, take(self.routed_b, routing.b, dtype, scale=self.mode.scale, gated=gated)

    def _kept_factors(self, this_pass: ForwardPass, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        kept: _Kept | None = this_pass.kept.get(self)
        if kept is None:
            raise TokenMapError(
                "a decode step came without its prefill: MixLoRA chooses its factors from the prompt, and nobody kept "
                "the choice. Use model.generate(), which does, or an adapter trained with --mixlora_routing sequence."
            )
        if kept.factors is None or kept.factors[0].shape[0] != rows:
            kept.factors = self._factors(kept.repeated(rows), dtype)
        return kept.factors


@dataclass
class _Kept:
    """What a prefill leaves for the decode steps: the choice, and from the first step on the factors themselves."""

    a: Tensor
    b: Tensor
    factors: tuple[Tensor, Tensor] | None = None

    def repeated(self, rows: int) -> Routing:
        """The routing for a generation that repeats every row (contrastive search), as often as `rows` needs."""
        times, rest = divmod(rows, len(self.a))
        if rest:
            raise TokenMapError(
                f"a decode step has {rows} rows and its prefill had {len(self.a)}, which is no "
                "divisor of it, so MixLoRA cannot tell which row continues which prompt."
            )
        return Routing(*(Choice(chosen.repeat_interleave(times, 0), None) for chosen in (self.a, self.b)))


@dataclass(frozen=True)
class MixLoRA(Mode):
    """Settings of MixLoRA, and its modules: one `RoutedLinear` on every chosen linear of the decoder.

    `variant` fixes three things together: `paper` contracts a_i with W_AB[i] as the paper writes, pools over the prompt
    and trains the routers; `released` does all three as the authors' released code, for their checkpoints. Pooling and
    router gradient can be set apart with `paper`.
    """

    name: ClassVar[str] = "mixlora"

    factors: int = setting(16, "E, factors in the pools of every linear, on each side")
    rank: int = setting(4, "r, how many of them are chosen for an instance")
    alpha: float | None = setting(None, "the update is scaled by alpha / rank; twice the factors if not given")
    dropout: float = setting(0.0, "dropout on the adapter's input")
    conditional: bool = setting(True, "choose B also by the chosen A (CFS); else on their own (IFS)")
    ifs_weight: float = setting(1.0, "w, weight of the conditional scores beside the independent ones")
    start_layer: int = setting(0, "first decoder layer with an adapter, counted from 0")
    targets: str = setting(ALL, "which linears of the decoder: all, or names such as q_proj,v_proj")
    routing: str | None = setting(
        None, "what a choice is made from: prompt (once) or sequence (every forward); prompt with variant paper"
    )
    router_grad: str | None = setting(
        None, "how routers learn: straight_through, or none (frozen); straight_through with variant paper"
    )
    balance: float | None = setting(
        None, f"coefficient of the load-balance loss, mean over all routers; {BALANCE} where they learn, 0: none"
    )
    noise: float = setting(0.0, "standard deviation of noise on the routers' logits while training")
    variant: str = setting(PAPER, "paper, or released: as the authors' code computes, for their checkpoints")

    @property
    def scale(self) -> float:
        """alpha / r."""
        return (2 * self.factors if self.alpha is None else self.alpha) / self.rank

    @property
    def pooling(self) -> str:
        """`routing`, with its default."""
        return self.routing or (SEQUENCE if self.variant == RELEASED else PROMPT)

    @property
    def router_learns(self) -> bool:
        """`router_grad`, with its default."""
        return (self.router_grad or (NO_GRADIENT if self.variant == RELEASED else STRAIGHT_THROUGH)) != NO_GRADIENT

    @property
    def balance_weight(self) -> float:
        """`balance`, with its default: routers that learn without it settle on few factors (docs/multitask.md)."""
        return (BALANCE if self.router_learns else 0.0) if self.balance is None else self.balance

    def problems(self, decoder: DecoderShape | None = None) -> list[str]:
        found = []
        if self.factors < 1:
            found.append(f"mixlora_factors is {self.factors}; it must be at least 1")
        if self.rank < 1 or self.rank > self.factors >= 1:
            found.append(f"mixlora_rank is {self.rank}; it must be from 1 to mixlora_factors, {self.factors}")
        if self.alpha is not None and not (self.alpha > 0 and math.isfinite(self.alpha)):
            found.append(f"mixlora_alpha is {self.alpha}; it must be above 0")
        if not 0 <= self.dropout < 1:
            found.append(f"mixlora_dropout is {self.dropout}; it must be at least 0 and below 1")
        for name in ("ifs_weight", "balance", "noise"):
            value = self.balance_weight if name == "balance" else getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                found.append(f"mixlora_{name} is {value}; it must be 0 or above")
        choices = {
            "routing": (PROMPT, SEQUENCE),
            "router_grad": (STRAIGHT_THROUGH, NO_GRADIENT),
            "variant": (PAPER, RELEASED),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known and not (value is None and name != "variant"):
                found.append(f"mixlora_{name} is {value!r}; choose one of {', '.join(known)}")
        return found + self._contradictions() + self._misses(decoder)

    def _contradictions(self) -> list[str]:
        found = []
        if self.variant == RELEASED and self.routing == PROMPT:
            found.append("mixlora_routing prompt contradicts mixlora_variant released, which pools the sequence")
        if self.variant == RELEASED and self.router_grad == STRAIGHT_THROUGH:
            found.append("mixlora_router_grad straight_through contradicts mixlora_variant released, which has none")
        if self.balance_weight > 0 and not self.router_learns:
            found.append(f"mixlora_balance is {self.balance} and the routers are frozen; it would change nothing")
        return found

    def _misses(self, decoder: DecoderShape | None) -> list[str]:
        """What is wrong with the choice of layers and linears."""
        if self.start_layer < 0:
            return [f"mixlora_start_layer is {self.start_layer}; it must be 0 or above"]
        if decoder is not None and self.start_layer >= len(decoder.layers):
            last = len(decoder.layers) - 1
            return [f"mixlora_start_layer is {self.start_layer}; the last of the model's layers is {last}"]
        try:
            if decoder is None:
                parse_targets(self.targets)
            else:
                find_targets(self.targets, decoder.layers[self.start_layer :])
        except ValueError as error:
            return [f"mixlora_targets: {error}"]
        return []

    def build(self, decoder: DecoderShape) -> dict[str, nn.Module]:
        hosts = find_targets(self.targets, decoder.layers[self.start_layer :])
        # Two routers a linear: the coefficient is that of the mean over all routers.
        balance = self.balance_weight / (2 * len(hosts))
        return {path: RoutedLinear(*features, mode=self, balance=balance) for path, features in hosts.items()}

    def report(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        figures = {}
        for side, name in enumerate("ab"):
            routed = [module for module in modules.values() if isinstance(module, RoutedLinear)]
            summary = mean_summary(module.observed[side] for module in routed)
            if summary is not None:
                figures[f"mixlora_entropy_{name}"] = round(float(summary[0]), 4)
                figures[f"mixlora_factors_{name}"] = round(float(summary[1]), 3)
        return figures
