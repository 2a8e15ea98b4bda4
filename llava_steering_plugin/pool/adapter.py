"""An adapter as a pool holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llava_steering_plugin.adapters.stored.config import AdapterConfig
from llava_steering_plugin.hooks.parameter_names import PROJECTOR


@dataclass(frozen=True)
class AdapterDetails:
    """The details of one adapter in a pool.

    Attributes:
        mode, settings: its tuning mode; "none" and nothing for the plain base.
        parameters: how many numbers it holds, with a projector of its own.
        bytes: the memory these take.
        path: the folder it was read from; for the base, what the model was loaded from.
        resident: on the model's device; else it waits in CPU memory.
        conversation: LLaVA's conversation template that it was trained with; None if unknown.
        full_name: what lists call the mode: its name, with the method where it has several.
        reads_padding: its rows would be other ones beside longer rows.
    """

    name: str
    mode: str
    settings: dict[str, Any]
    parameters: int
    bytes: int
    path: Path
    resident: bool
    conversation: str | None
    full_name: str
    reads_padding: bool = False


@dataclass(eq=False)
class PooledAdapter:
    """An adapter in a pool. Its modules never change; the pool notes here where they are and how many calls use them.

    Attributes:
        name: under which the pool knows it.
        config, path: as read.
        full_name: of its mode.
        modules: in eval mode, by the path of their host below the decoder stack.
        projector: the adapter's own; None if it takes the base's.
        newline: the adapter's own image_newline; None if it takes the base's.
        at_decode: those of the modules that are called at decode steps; the others change nothing there.
        resident: on the model's device rather than in CPU memory.
        reads_padding: padding in a batch changes its rows.
        users: calls in flight that use it.
    """

    name: str
    config: AdapterConfig
    path: Path
    full_name: str
    modules: Mapping[str, nn.Module]
    projector: nn.Module | None
    at_decode: Mapping[str, nn.Module]
    newline: Tensor | None = None
    reads_padding: bool = False
    resident: bool = field(default=False, init=False)
    users: int = field(default=0, init=False)

    @property
    def has_image_parts(self) -> bool:
        """True if it makes other image features than the base."""
        return self.projector is not None or self.newline is not None

    def tensors(self) -> list[Tensor]:
        """Return everything that it keeps in memory."""
        parts = [*self.modules.values(), *([self.projector] if self.projector is not None else [])]
        found = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
        return [*found, self.newline] if self.newline is not None else found

    def hosts(self) -> list[str]:
        """Return the paths of the hosts that need a hook for it."""
        return [*self.modules, *([PROJECTOR] if self.projector is not None else [])]

    def details(self) -> AdapterDetails:
        """Return its details."""
        tensors, config = self.tensors(), self.config
        return AdapterDetails(
            self.name,
            config.mode,
            dict(config.settings),
            sum(tensor.numel() for tensor in tensors),
            sum(tensor.nbytes for tensor in tensors),
            self.path,
            self.resident,
            config.conversation,
            self.full_name,
            self.reads_padding,
        )
