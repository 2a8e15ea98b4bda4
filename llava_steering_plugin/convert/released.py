"""A released checkpoint as the conversion takes it: a mode with its settings, weights to copy, and notes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llava_steering_plugin.modes.base import DecoderShape, Mode


@dataclass(frozen=True)
class Note:
    """Something in a checkpoint that its conversion does not hold, or that works in another way there."""

    entry: str
    what: str


@dataclass
class Released(ABC):
    """One of the authors' checkpoints, read and checked as far as that goes without its base.

    Attributes:
        folder: the checkpoint, as named in errors.
        mode: the tuning mode with the checkpoint's settings.
        base_name: what the checkpoint calls its base; None if it does not say.
        config: the checkpoint's own config of the whole model, as LLaVA would write it; None if it holds none.
        base: the base's tensors that the checkpoint repeats, under the base's own names.
        projector: the trained tensors of the projector, under LLaVA's names.
        added_tokens: tokens beyond the base's vocabulary that the checkpoint's tokenizer lists, with their ids.
        notes: what is not carried over.
    """

    folder: Path
    mode: Mode
    base_name: str | None
    config: dict[str, Any] | None
    base: Mapping[str, Tensor]
    projector: Mapping[str, Tensor]
    added_tokens: Mapping[str, int] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    @abstractmethod
    def fill(self, shape: DecoderShape, modules: Mapping[str, nn.Module]) -> None:
        """Copy the checkpoint's weights into modules that `mode.build(shape)` gave.

        Raises:
            AdapterError: tensors are missing or do not fit the decoder; all of them in one error.
        """
