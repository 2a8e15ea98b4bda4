"""MixLoRA: low-rank factors that are chosen for every instance (arXiv 2402.15896, sec. 3).

    y = base(x) + (alpha/r) (x A^T) B,   A = r of E factors a_e in R^in,   B = r of E factors b_e in R^out

Independent selection (IFS): A by the scores  W_A mean(x),  B by  W_B mean(x). Conditional selection (CFS): B by

    softmax(W_B mean(x)) + w softmax( sum_i softmax(a_i . W_AB[i]) ),   a_1 ... a_r the chosen A factors.

The k-th A goes with the k-th B, in order of score. The choice is made once for each row of a batch, and no tensor of
shape [rows, in, out] is ever made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from llava_steering_plugin.distributed import is_partitioned
from llava_steering_plugin.errors import TokenMapError
from llava_steering_plugin.modes.base import DecoderShape, ForwardPass, largest_in, no_autocast
from llava_steering_plugin.modes.mixlora_balance import BalanceOverSteps, Tally, shares
from llava_steering_plugin.modes.mixlora_factors import updated
from llava_steering_plugin.modes.mixlora_routing import Choice, Observed, Routing, mean_summary
from llava_steering_plugin.modes.mixlora_settings import RELEASED, MixLoRASettings
from llava_steering_plugin.modes.mixlora_shared import Shared, chosen, shared
from llava_steering_plugin.modes.mixlora_steps import step_of, together
from llava_steering_plugin.modes.mixlora_targets import find_targets
from llava_steering_plugin.modes.mixlora_together import Together

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
        self.choose: Callable[[Tensor, ForwardPass], Routing] | None = None
        self.together: Together[RoutedLinear] = Together()
        self.observed = (Observed.nothing(), Observed.nothing())
        self.tallies = (Tally(factors), Tally(factors))

    # Rows of several adapters at a decode step.
    at_once = staticmethod(together)

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
        dtype = output.dtype

        def share(linears: Sequence[RoutedLinear]) -> Shared:
            hidden = inputs.reshape(rows, positions, -1) if inputs.dim() == 2 else inputs
            return shared(_able(linears), hidden, this_pass, dtype)

        with no_autocast(output.device):
            if inputs.dim() == output.dim() == 3 and (step := step_of(self, rows, this_pass, dtype)) is not None:
                return updated(output, step.narrow_of(self, inputs, this_pass), step.b[self], self.mode.scale)
            common = self.together.share(self, inputs, dtype, this_pass, share)
            if self not in common.linears:
                common = share([self])
            hidden, narrow = common.narrow_of(self)
            b = common.b[self]
            if output.dim() == 2:
                by_rows = output.reshape(rows, positions, -1)
                return updated(by_rows, narrow, b, self.mode.scale).view_as(output)
            return updated(output, narrow, b, self.mode.scale, hidden if weight is not None else None, weight)

    def factors_for(self, hidden: Tensor, this_pass: ForwardPass, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A [rows, r, in] and alpha / r B [rows, r, out], of `dtype`, for `hidden` [rows, positions, in]."""
        alone = shared([self], hidden, this_pass, dtype)
        return alone.a, alone.b[self] * self.mode.scale

    def route(self, hidden: Tensor, this_pass: ForwardPass) -> Routing:
        """Choose r factors on each side for every row, from its `hidden` [rows, positions, in]."""
        gates, _ = chosen([self], hidden, this_pass)
        sides = zip(gates.chosen, gates.scores, gates.shares, strict=True)
        return Routing(*(Choice(factors[:, 0], scores[:, 0] * share) for factors, scores, share in sides))

    def instead(self, hidden: Tensor, this_pass: ForwardPass) -> Routing | None:
        """Return the choice that `choose` makes in the routers' place; None where they choose."""
        return None if self.choose is None else self.choose(hidden, this_pass)

    def shares(self, tallies: Sequence[Tally], choices: Tensor) -> Tensor:
        """Return f of the load-balance loss for routers, float32 [routers, E].

        Args:
            choices: of the pass, int64 [routers, rows, r].
        """
        return shares(tallies, choices.flatten(1), counted=self.training)

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


def _able(linears: Sequence[RoutedLinear]) -> list[RoutedLinear]:
    """Return the first linear, and those of the others that it can work for.

    Not where a choice is made elsewhere, and not where parameters are on another device or cut over ranks: these are
    whole only while their own linear runs. Noise is drawn by each linear in its turn, so that the numbers are the same
    whether or not it is known already which linears go together. Gradients outside of a training are each linear's own
    too: together they are summed in another order, and only a training's checkpoint holds which linears go together.
    """
    first, *others = linears
    apart = first.mode.noise if first.training else torch.is_grad_enabled()
    if apart or first.choose is not None or is_partitioned(first.routed_a):
        return [first]
    device, training = first.routed_a.device, first.training
    return [
        first,
        *(
            each
            for each in others
            if each.choose is None
            and each.training == training
            and each.routed_a.device == device
            and not is_partitioned(each.routed_a)
        ),
    ]


@dataclass(frozen=True)
class MixLoRA(MixLoRASettings):
    """Puts one `RoutedLinear` on every chosen linear of the decoder; `MixLoRASettings` has the settings."""

    name: ClassVar[str] = "mixlora"

    def build(self, decoder: DecoderShape) -> dict[str, nn.Module]:
        hosts = find_targets(self.targets, decoder.layers[self.start_layer :])
        # Two routers a linear: the coefficient is that of the mean over all routers.
        balance = self.balance_weight / (2 * len(hosts))
        made = {path: RoutedLinear(*features, mode=self, balance=balance) for path, features in hosts.items()}
        together: Together[RoutedLinear] = Together()
        for linear in made.values():
            linear.together = together
        return dict(made)

    def unsound(self, modules: Mapping[str, nn.Module], dtype: torch.dtype) -> list[str]:
        return [
            f"{path}.{problem}"
            for path, module in modules.items()
            if isinstance(module, RoutedLinear)
            for problem in module.unsound(dtype)
        ]

    def statistics(self, modules: Mapping[str, nn.Module]) -> BalanceOverSteps | None:
        linears = {path: module for path, module in modules.items() if isinstance(module, RoutedLinear)}
        if not linears:
            return None
        balanced = linears if self.balance_weight and self.trained_routers else {}
        tallies = {
            f"{path}.{side}": tally
            for path, linear in balanced.items()
            for side, tally in zip("ab", linear.tallies, strict=True)
        }
        together = next(iter(linears.values())).together
        return BalanceOverSteps(tallies, together, {linear: path for path, linear in linears.items()})

    def report(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        figures = {}
        for side, name in enumerate("ab"):
            routed = [module for module in modules.values() if isinstance(module, RoutedLinear)]
            summary = mean_summary(module.observed[side] for module in routed)
            if summary is not None:
                figures[f"mixlora_entropy_{name}"] = round(float(summary[0]), 4)
                figures[f"mixlora_factors_{name}"] = round(float(summary[1]), 3)
        return figures
