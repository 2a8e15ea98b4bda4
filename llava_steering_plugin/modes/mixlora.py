"""MixLoRA: low-rank factors that are chosen for every instance (arXiv 2402.15896, sec. 3).

    y = base(x) + (alpha/r) (x A^T) B,   A = r of E factors a_e in R^in,   B = r of E factors b_e in R^out

Independent selection (IFS): A by the scores  W_A mean(x),  B by  W_B mean(x). Conditional selection (CFS): B by

    softmax(W_B mean(x)) + w softmax( sum_i softmax(a_i . W_AB[i]) ),   a_1 ... a_r the chosen A factors.

The k-th A goes with the k-th B, in order of score. The choice is made once for each row of a batch, and no tensor of
shape [rows, in, out] is ever made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from llava_steering_plugin.errors import TokenMapError
from llava_steering_plugin.modes.base import DecoderShape, ForwardPass, largest_in, no_autocast
from llava_steering_plugin.modes.mixlora_balance import BalanceOverSteps, Tally
from llava_steering_plugin.modes.mixlora_factors import take, updated
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
from llava_steering_plugin.modes.mixlora_settings import PROMPT, RELEASED, MixLoRASettings
from llava_steering_plugin.modes.mixlora_targets import find_targets

# Updates that a layer may multiply before a norm makes them small again: gate x up x down, and one to spare.
MULTIPLIED = 4

__all__ = ["RELEASED", "MixLoRA", "RoutedLinear"]


class RoutedLinear(nn.Module):
    """Adds the low-rank update to one linear: holds the pools of factors and the routers that choose from them.

    Parameters, float32 (in brackets, their names in the authors' checkpoints, below the linear's name):
        routed_a [E, in]: the A factors (lora_A.default.0 ... E-1, [1, in] each).
        routed_b [E, out]: the B factors, zero at first (lora_B.default.0 ... E-1, [1, out] each).
        router_a [E, in]: W_A (cmoa_selector.loraA_selector.weight).
        router_b [E, in]: W_B (cmoa_selector.loraB_selector.weight; with conditional selection
            cmoa_loarB_extra_selector.loraB_selector.weight).
        router_ab [r, E, in]: W_AB, with conditional selection only (cmoa_loarB_extra_selector.
            loraA_param2loraB_selector.weight [E, r * in] = router_ab.transpose(0, 1).reshape(E, r * in)).

    Args:
        in_features, out_features: widths of the linear.
        mode: the settings.
        balance: weight of this linear's load-balance loss, on each side.

    Shapes:
        output: [rows, positions, out] in any float dtype, in which the update is computed (the routers compute in
            float32). The update is written into it.
        inputs: [rows, positions, in]; rows and positions of both tensors may be flattened into one.
    """

    def __init__(self, in_features: int, out_features: int, mode: MixLoRA, balance: float = 0.0):
        super().__init__()
        self.mode, self.balance = mode, balance
        trained, factors = mode.trained_routers, mode.factors
        self.learns = bool(trained)

        def router(name: str, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, in_features, dtype=torch.float32), requires_grad=name in trained)

        self.routed_a = nn.Parameter(torch.empty(factors, in_features, dtype=torch.float32))
        self.routed_b = nn.Parameter(torch.zeros(factors, out_features, dtype=torch.float32))
        self.router_a = router("router_a", factors)
        self.router_b = router("router_b", factors)
        if mode.conditional:
            self.router_ab = router("router_ab", mode.rank, factors)
        for name, parameter in self.named_parameters():
            if name != "routed_b":
                # As nn.Linear's: kaiming_uniform with a = sqrt(5).
                nn.init.uniform_(parameter, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))
        self.dropout = nn.Dropout(mode.dropout)
        # Whether choices have probabilities in eval mode too, which a measure may look at.
        self.shows_probabilities = False
        self.observed = (Observed.nothing(), Observed.nothing())
        self.tallies = (Tally(factors), Tally(factors))

    @property
    def takes_backward(self) -> bool:
        """Say whether the backward pass of a plain linear is to be done here too, which is cheaper than autograd's."""
        return self.training and self.routed_a.requires_grad and not self.dropout.p

    def forward(self, output: Tensor, inputs: Tensor, this_pass: ForwardPass, weight: Tensor | None = None) -> Tensor:
        """Return `output` plus the update of every row with the factors chosen for it.

        Args:
            weight: of the linear, if `output` is detached and its backward pass is to be done here.

        Raises:
            TokenMapError: the linear sees other positions than the pass has, or a decode step has no prefill.
        """
        rows, positions = this_pass.prompt.shape
        if inputs.shape[:-1] not in ((rows, positions), (rows * positions,)):
            raise TokenMapError(
                f"a linear of the decoder got {list(inputs.shape)} where the pass has {[rows, positions]} rows and "
                "positions, so MixLoRA cannot tell which rows these tokens belong to (as in the experts of a mixture). "
                "Leave such linears out with --mixlora_targets."
            )
        if inputs.dim() == 2:
            by_rows = output.reshape(rows, positions, -1), inputs.reshape(rows, positions, -1)
            return self._updated(by_rows[0], by_rows[1], this_pass, weight).view_as(output)
        return self._updated(output, inputs, this_pass, weight)

    def _updated(self, output: Tensor, inputs: Tensor, this_pass: ForwardPass, weight: Tensor | None) -> Tensor:
        # No views here: autograd adds the base's gradient into the one that `updated` returns if nothing else refers
        # to that, and otherwise allocates a third tensor of the input's size for the sum.
        with no_autocast(output.device):
            a, b = self.factors_for(inputs, this_pass, output.dtype)
            return updated(output, self.dropout(inputs.to(output.dtype)), a, b, weight)

    def factors_for(self, hidden: Tensor, this_pass: ForwardPass, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A [rows, r, in] and alpha / r B [rows, r, out], of `dtype`, for `hidden` [rows, positions, in]."""
        if this_pass.decode and self.mode.pooling == PROMPT:
            return self._kept_factors(this_pass, len(hidden), dtype)
        routing = self.route(hidden, this_pass)
        this_pass.kept[self] = _Kept(routing.a.factors, routing.b.factors)
        return self._factors(routing, dtype)

    def route(self, hidden: Tensor, this_pass: ForwardPass) -> Routing:
        """Choose r factors on each side for every row, from its `hidden` [rows, positions, in]."""
        with torch.no_grad():
            # The routers learn from the hidden states; the hidden states get no gradient from the routers.
            pooled = masked_mean(hidden, self._pooling_weights(hidden, this_pass))
        learning = self.learns and torch.is_grad_enabled()
        watched = learning or self.training or self.shows_probabilities
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
            a, b = (self._balanced(choice, side, this_pass) for side, choice in enumerate((a, b)))
        return Routing(a, b)

    def _balanced(self, choice: Choice, side: int, this_pass: ForwardPass) -> Choice:
        def count() -> Tensor:
            return self.tallies[side].shares(choice.factors, counted=self.training)

        # Once for a pass: gradient checkpointing comes here again, with the same pass, when it recomputes.
        return balanced(choice, self.balance, this_pass, this_pass.once(("mixlora balance", self, side), count))

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
        # B carries the scale because its values are small: A's could leave the range of half precision.
        gated = self.learns and torch.is_grad_enabled()
        a = take(self.routed_a, routing.a, dtype, gated=gated)
        return a, take(self.routed_b, routing.b, dtype, scale=self.mode.scale, gated=gated)

    def unsound(self, dtype: torch.dtype) -> list[str]:
        """Return what leaves the range of `dtype` for an input of the usual size, whichever factors are chosen."""
        named = str(dtype).removeprefix("torch.")
        limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max ** (1 / MULTIPLIED))
        reach = math.sqrt(self.routed_a.shape[1])
        narrow = float(self.routed_a.norm(dim=1).amax()) * reach
        if not narrow <= limit:
            return [f"routed_a: its products with hidden states overflow {named}"]
        found = []
        if not float(self.routed_b.abs().amax()) * abs(self.mode.scale) * narrow * self.mode.rank <= limit:
            found.append(f"routed_b: the update, scaled by alpha / rank = {self.mode.scale:.3g}, overflows {named}")
        for name, router in self.named_parameters():
            if name.startswith("router") and not float(router.norm(dim=-1).amax()) * reach <= largest_in(torch.float32):
                found.append(f"{name}: its products with hidden states overflow float32")
        return found

    def _kept_factors(self, this_pass: ForwardPass, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        kept: _Kept | None = this_pass.kept.get(self)
        if kept is None:
            raise TokenMapError(
                "a decode step came without its prefill: MixLoRA chooses its factors from the prompt, and the choice "
                "was not kept. Use model.generate(), which keeps it, or an adapter trained with --mixlora_routing "
                "sequence."
            )
        if kept.factors is None or kept.factors[0].shape[0] != rows:
            kept.factors = self._factors(kept.repeated(rows), dtype)
        return kept.factors


@dataclass
class _Kept:
    """The choice that a prefill leaves for its decode steps: int64 [rows, r] each; the first step adds the factors."""

    a: Tensor
    b: Tensor
    factors: tuple[Tensor, Tensor] | None = None

    def repeated(self, rows: int) -> Routing:
        """Return the routing of `rows` rows, each row of the prefill repeated alike (contrastive search does so)."""
        times, rest = divmod(rows, len(self.a))
        if rest:
            raise TokenMapError(
                f"a decode step has {rows} rows and its prefill had {len(self.a)}, which is no "
                "divisor of it, so MixLoRA cannot tell which row continues which prompt."
            )
        return Routing(*(Choice(chosen.repeat_interleave(times, 0), None) for chosen in (self.a, self.b)))


@dataclass(frozen=True)
class MixLoRA(MixLoRASettings):
    """Puts one `RoutedLinear` on every chosen linear of the decoder; `MixLoRASettings` has the settings."""

    name: ClassVar[str] = "mixlora"

    def build(self, decoder: DecoderShape) -> dict[str, nn.Module]:
        hosts = find_targets(self.targets, decoder.layers[self.start_layer :])
        # Two routers a linear: the coefficient is that of the mean over all routers.
        balance = self.balance_weight / (2 * len(hosts))
        return {path: RoutedLinear(*features, mode=self, balance=balance) for path, features in hosts.items()}

    def unsound(self, modules: Mapping[str, nn.Module], dtype: torch.dtype) -> list[str]:
        return [
            f"{path}.{problem}"
            for path, module in modules.items()
            if isinstance(module, RoutedLinear)
            for problem in module.unsound(dtype)
        ]

    def statistics(self, modules: Mapping[str, nn.Module]) -> BalanceOverSteps | None:
        if not (self.balance_weight and self.trained_routers):
            return None
        return BalanceOverSteps(
            {
                f"{path}.{side}": tally
                for path, module in modules.items()
                if isinstance(module, RoutedLinear)
                for side, tally in zip("ab", module.tallies, strict=True)
            }
        )

    def report(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        figures = {}
        for side, name in enumerate("ab"):
            routed = [module for module in modules.values() if isinstance(module, RoutedLinear)]
            summary = mean_summary(module.observed[side] for module in routed)
            if summary is not None:
                figures[f"mixlora_entropy_{name}"] = round(float(summary[0]), 4)
                figures[f"mixlora_factors_{name}"] = round(float(summary[1]), 3)
        return figures
