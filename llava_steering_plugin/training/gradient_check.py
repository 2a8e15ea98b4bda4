"""Check in the first steps of a training that every parameter of the adapter receives a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from llava_steering_plugin.errors import SteeringError, listing

# The inner factors of a new adapter have zero gradients in the first step, because the outer ones are zero, and the
# warm-up of the learning rate makes the first steps small.
STEPS = 10


class GradientCheck(TrainerCallback):
    """Stop the training if a parameter had no gradient in the first step, or only zeros in the first `STEPS`.

    Zeros are expected in the last decoder layer: the hidden state of a visual token reaches no other token from there,
    and visual tokens have no targets of their own.

    Args:
        parameters: of the adapter, by name.
        last_layer: path of the last decoder layer, with which the names of its parameters begin.
    """

    # Hooks rather than `.grad`, which DeepSpeed keeps elsewhere. They are removed after the check.

    def __init__(self, parameters: Mapping[str, nn.Parameter], last_layer: str):
        self.names = list(parameters)
        self.last_layer = last_layer
        first = next(iter(parameters.values()))
        # [0]: a gradient arrived; [1]: it had a non-zero element. Read twice only: other steps do not wait for it.
        self.seen = torch.zeros(2, len(self.names), device=first.device)
        self.steps = 0
        self.handles = [parameter.register_hook(self._hook(at)) for at, parameter in enumerate(parameters.values())]

    def _hook(self, at: int) -> Any:
        def note(gradient: Tensor) -> None:
            if self.seen.device != gradient.device:
                self.seen = self.seen.to(gradient.device)
            self.seen[0, at] = 1
            self.seen[1, at] = torch.maximum(self.seen[1, at], (gradient != 0).any().float())

        return note

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.handles:
            return
        self.steps += 1
        if self.steps in (1, STEPS):
            # Offloaded parameters are on the CPU, and ranks cannot exchange what is there.
            self.seen = self.seen.to(args.device)
            self._judge()
        if self.steps == STEPS:
            for handle in self.handles:
                handle.remove()
            self.handles = []

    def _judge(self) -> None:
        # A rank may have had no images so far; one rank that had some is enough.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.seen, torch.distributed.ReduceOp.MAX)
        arrived, nonzero = (row.bool().tolist() for row in self.seen.cpu())
        problems = [
            f"{name}: no gradient arrived" for name, there in zip(self.names, arrived, strict=True) if not there
        ]
        if self.steps == STEPS:
            problems += [
                f"{name}: all gradients were zero"
                for name, there, some in zip(self.names, arrived, nonzero, strict=True)
                if there and not some and not name.startswith(f"{self.last_layer}.")
            ]
        if problems:
            shown = problems[:10] + ([f"... and {len(problems) - 10} more"] if len(problems) > 10 else [])
            raise SteeringError(
                listing(
                    f"after {self.steps} step(s), {len(problems)} of the adapter's {len(self.names)} parameters cannot "
                    "learn. Likely reasons: the data has no images (or no visual token is selected), everything is "
                    "masked out of the loss, or gradient checkpointing runs on inputs that need no gradient",
                    shown,
                )
            )
