"""Lead a mode's statistics through a training: they learn what a step is, and when one has ended on all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from transformers import TrainerCallback

from llava_steering_plugin.modes.base import StepStatistics


class StepEnd(TrainerCallback):
    """Tells the statistics of the end of every optimizer step, and adds them up over the ranks.

    Args:
        statistics: of the mode; None where it has none.
    """

    def __init__(self, statistics: StepStatistics | None):
        self.statistics = statistics

    def begin(self, arguments: Any) -> None:
        """Tell them how many passes make a step of the training with these arguments."""
        if self.statistics is not None:
            self.statistics.begin(arguments.gradient_accumulation_steps * arguments.world_size)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.statistics is not None:
            self.statistics.end_step(lambda tensor: over_ranks(tensor, args.device))

    def state(self) -> dict[str, Any] | None:
        """Return what a checkpoint has to hold; None where there are no statistics."""
        return None if self.statistics is None else self.statistics.state()

    def resume(self, state: dict[str, Any] | None) -> None:
        """Go on from the state in a checkpoint.

        Args:
            state: None if an earlier version wrote the checkpoint, in which every pass stood alone: it goes on so.
        """
        if self.statistics is None:
            return
        if state is None:
            self.statistics.begin(1)
            self.statistics = None
        else:
            self.statistics.load(state)


def over_ranks(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the sum of a tensor over all ranks, on the device that they exchange tensors from. Every rank calls it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensor
    total = tensor.to(device, copy=True)
    distributed.all_reduce(total)
    return total
