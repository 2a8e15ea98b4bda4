"""Settings of MixLoRA (arXiv 2402.15896): its flags, the defaults that depend on other flags, and their check."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from llava_steering_plugin.modes.base import DecoderShape, Mode, setting
from llava_steering_plugin.modes.mixlora_targets import ALL, find_targets, parse_targets

PROMPT, SEQUENCE = "prompt", "sequence"
STRAIGHT_THROUGH, NO_GRADIENT = "straight_through", "none"
PAPER, RELEASED = "paper", "released"
BALANCE = 0.05
_FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True)
class MixLoRASettings(Mode):
    """Holds and checks the settings of MixLoRA; the subclass `mixlora.MixLoRA` builds the modules.

    `variant` fixes three things together: `paper` contracts a_i with W_AB[i] as the paper writes, pools over the prompt
    and trains the routers; `released` does all three as the authors' released code, for their checkpoints. Pooling and
    router gradient can be set apart with `paper`.
    """

    factors: int = setting(
        16, "E, factors in the pools of every linear, on each side; of 1 there is no choice, so no router is trained"
    )
    rank: int = setting(4, "r, how many of them are chosen for an instance")
    alpha: float | None = setting(None, "the update is scaled by alpha / rank; twice the factors if not given")
    dropout: float = setting(0.0, "dropout on the adapter's input; 0.05 in the paper")
    conditional: bool = setting(True, "choose B also by the chosen A (CFS); else on their own (IFS)")
    ifs_weight: float = setting(
        1.0, "w, weight of the conditional scores beside the independent ones; 0: they do not count, nor are trained"
    )
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
        """Return alpha / r, the factor on the update."""
        return (2 * self.factors if self.alpha is None else self.alpha) / self.rank

    @property
    def pooling(self) -> str:
        """Return `routing`, with its default."""
        return self.routing or (SEQUENCE if self.variant == RELEASED else PROMPT)

    @property
    def reads_padding(self) -> bool:
        """Say whether choices depend on the padding in a batch, which `sequence` pools too."""
        return self.pooling == SEQUENCE

    @property
    def router_learns(self) -> bool:
        """Say whether the routers are trained: `router_grad`, with its default."""
        return (self.router_grad or (NO_GRADIENT if self.variant == RELEASED else STRAIGHT_THROUGH)) != NO_GRADIENT

    @property
    def trained_routers(self) -> frozenset[str]:
        """Return the names of the routers that are trained: those of `router_learns` that can change a choice.

        The others never get a gradient, and a training stops where a parameter gets none. They are kept and saved all
        the same, so that a setting does not change which tensors an adapter has.
        """
        if not self.router_learns or self.factors == 1:
            return frozenset()
        trained = {"router_a", "router_b", "router_ab"} if self.conditional else {"router_a", "router_b"}
        if self.ifs_weight < _FLOAT32.eps:
            trained.discard("router_ab")  # the sum of scores is, to the last bit, that of the independent ones
        elif self.conditional and self.ifs_weight > 1 / _FLOAT32.eps:
            trained.discard("router_b")
        return frozenset(trained)

    @property
    def balance_weight(self) -> float:
        """Return `balance`, with its default: without it learning routers settle on few factors (docs/multitask.md)."""
        return (BALANCE if self.router_learns else 0.0) if self.balance is None else self.balance

    def problems(self, decoder: DecoderShape | None = None) -> list[str]:
        found = []
        if self.factors < 1:
            found.append(f"mixlora_factors is {self.factors}; it must be at least 1")
        if self.rank < 1 or self.rank > self.factors >= 1:
            found.append(f"mixlora_rank is {self.rank}; it must be from 1 to mixlora_factors, {self.factors}")
        if self.alpha is not None and not (self.alpha > 0 and math.isfinite(self.alpha)):
            found.append(f"mixlora_alpha is {self.alpha}; it must be above 0")
        elif min(self.rank, self.factors) >= 1 and not _FLOAT32.tiny <= self.scale <= _FLOAT32.max:
            found.append(f"mixlora_alpha / mixlora_rank is {self.scale:.3g}; it must be within float32")
        if not 0 <= self.dropout < 1:
            found.append(f"mixlora_dropout is {self.dropout}; it must be at least 0 and below 1")
        for name in ("ifs_weight", "balance", "noise"):
            value = self.balance_weight if name == "balance" else getattr(self, name)
            if not 0 <= value <= _FLOAT32.max:
                found.append(f"mixlora_{name} is {value}; it must be 0 or above, and within float32")
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
        """Return everything wrong with the choice of layers and linears."""
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
