"""Compute MixLoRA's decode steps (arXiv 2402.15896, sec. 3): the factors that the prefill has chosen, and no more.

Choosing is over then, so what is left is two small products for each linear. To look up what linears share, adapter by
adapter, would take longer; so that is kept from step to step, and rows of several adapters are one product.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_steering_plugin.errors import TokenMapError
from llava_steering_plugin.modes.base import ForwardPass, no_autocast
from llava_steering_plugin.modes.mixlora_factors import updated
from llava_steering_plugin.modes.mixlora_settings import MixLoRASettings

# Takes output, inputs and the pass, as a module of a mode does.
Update = Callable[[Tensor, Tensor, ForwardPass], Tensor]


class Stepping(Hashable, Protocol):
    """A linear with factors, of which a prefill has chosen some; `mixlora.RoutedLinear` documents it."""

    training: bool
    routed_a: nn.Parameter
    routed_b: nn.Parameter

    @property
    def mode(self) -> MixLoRASettings: ...


@dataclass(eq=False)
class Step:
    """Holds what decode steps need of linears that are called on one tensor. It stays the same from step to step.

    Attributes:
        linears: in the order of their calls.
        a: chosen factors of all of them, [rows, linears * r, in].
        b: chosen factors of each, without the scale, [rows, r, out] in the same dtype.
        of_all: the same of the rows of several adapters, this one the first, and the steps it was made of.
    """

    linears: Sequence[Stepping]
    a: Tensor
    b: Mapping[Any, Tensor]
    of_all: tuple[list[Step], Step] | None = None

    def narrow_of(self, linear: Stepping, inputs: Tensor, this_pass: ForwardPass) -> Tensor:
        """Return the products of `inputs` [rows, positions, in] with a linear's A, [rows, r, positions]."""
        latest = this_pass.once(self, _Narrowed)
        # Inference tensors count no changes.
        version = None if inputs.is_inference() else inputs._version
        if latest.inputs is not inputs or latest.version != version:
            narrow = torch.bmm(self.a, inputs.to(self.a.dtype).transpose(1, 2))
            parts = torch.split(narrow, linear.mode.rank, 1) if len(self.linears) > 1 else (narrow,)
            latest.inputs, latest.version = inputs, version
            latest.parts = dict(zip(self.linears, parts, strict=True))
        return latest.parts[linear]


class _Narrowed:
    """The latest products of a pass, and what they were made of."""

    inputs: Tensor | None = None
    version: int | None = None
    parts: Mapping[Stepping, Tensor] = {}


@dataclass
class Kept:
    """The choice that a prefill leaves for its decode steps: int64 [rows, r] each; the first step adds the factors."""

    a: Tensor
    b: Tensor
    step: Step | None = None

    def repeated(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return the choice of `rows` rows, each row of the prefill repeated alike (contrastive search does so)."""
        times, rest = divmod(rows, len(self.a))
        if rest:
            raise TokenMapError(
                f"a decode step has {rows} rows and its prefill had {len(self.a)}, which is no "
                "divisor of it, so MixLoRA cannot tell which row continues which prompt."
            )
        return self.a.repeat_interleave(times, 0), self.b.repeat_interleave(times, 0)


def step_of(linear: Stepping, rows: int, this_pass: ForwardPass, dtype: torch.dtype) -> Step | None:
    """Return what an earlier decode step has left for this one, of as many rows; None where there is nothing.

    There is nothing in training and where gradients are wanted.
    """
    if not this_pass.decode or linear.training or torch.is_grad_enabled():
        return None
    kept: Kept | None = this_pass.kept.get(linear)
    step = None if kept is None else kept.step
    return None if step is None or len(step.a) != rows or step.a.dtype != dtype else step


def together(linears: Sequence[Stepping], passes: Sequence[ForwardPass], dtype: torch.dtype) -> Update | None:
    """Return what updates the rows of several adapters at once, at one host; None where each has to do its own.

    Args:
        linears: of these adapters, at the host.
        passes: of each, for its own rows.
    """
    steps = []
    for linear, this_pass in zip(linears, passes, strict=True):
        step = step_of(linear, len(this_pass.visual), this_pass, dtype)
        if step is None:
            return None
        steps.append(step)
    first, mode, place = steps[0], linears[0].mode, steps[0].linears.index(linears[0])
    for linear, step in zip(linears[1:], steps[1:], strict=True):
        alike = linear.mode.rank == mode.rank and linear.mode.scale == mode.scale and step.a.device == first.a.device
        if not alike or len(step.linears) != len(first.linears) or step.linears[place] is not linear:
            return None
    if first.of_all is None or first.of_all[0] != steps:
        b = {
            linear: torch.cat([step.b[step.linears[number]] for step in steps])
            for number, linear in enumerate(first.linears)
        }
        first.of_all = steps, Step(first.linears, torch.cat([step.a for step in steps]), b)
    return partial(_updated, first.of_all[1], linears[0])


def _updated(step: Step, linear: Stepping, output: Tensor, inputs: Tensor, this_pass: ForwardPass) -> Tensor:
    with no_autocast(output.device):
        return updated(output, step.narrow_of(linear, inputs, this_pass), step.b[linear], linear.mode.scale)


def kept_step(linears: Sequence[Stepping], this_pass: ForwardPass, rows: int, dtype: torch.dtype) -> Step:
    """Return what decode steps need of linears that are called on one tensor, made of what the prefill has chosen.

    Raises:
        TokenMapError: there was no prefill.
    """
    first: Kept | None = this_pass.kept.get(linears[0])
    if first is None:
        raise TokenMapError(
            "a decode step came without its prefill: MixLoRA chooses its factors from the prompt, and the choice "
            "was not kept. Use model.generate(), which keeps it, or an adapter trained with --mixlora_routing "
            "sequence."
        )
    step = first.step
    if step is None or step.linears != linears or len(step.a) != rows or step.a.dtype != dtype:
        choices = [this_pass.kept[linear].repeated(rows) for linear in linears]
        a = [F.embedding(of_a, linear.routed_a) for linear, (of_a, _) in zip(linears, choices, strict=True)]
        b = {
            linear: F.embedding(of_b, linear.routed_b).to(dtype)
            for linear, (_, of_b) in zip(linears, choices, strict=True)
        }
        step = Step(linears, (torch.cat(a, 1) if len(a) > 1 else a[0]).to(dtype), b)
        for linear in linears:
            this_pass.kept[linear].step = step
    return step
