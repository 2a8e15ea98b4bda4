"""An adapter as a pool holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from llava_steering_plugin.adapters.config import AdapterConfig


@dataclass(eq=False)
class PooledAdapter:
    """An adapter in a pool. Its modules never change; the pool notes here where they are and how many calls use them.

    Attributes:
        name: under which the pool knows it.
        config, path: as read.
        modules: in eval mode, by the path of their host below the decoder stack.
        projector: the adapter's own; None if it takes the base's.
        idle_at_decode: the modules change nothing at decode steps.
        resident: on the model's device rather than in CPU memory.
        users: calls in flight that use it.
    """

    name: str
    config: AdapterConfig
    path: Path
    modules: Mapping[str, nn.Module]
    projector: nn.Module | None
    idle_at_decode: bool
    resident: bool = field(default=False, init=False)
    users: int = field(default=0, init=False)

    def tensors(self) -> list[Tensor]:
        """Return everything that it keeps in memory."""
        parts = [*self.modules.values(), *([self.projector] if self.projector is not None else [])]
        return [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
