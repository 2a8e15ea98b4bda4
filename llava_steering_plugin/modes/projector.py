"""The projector alone: nothing is put on the decoder, as a baseline for what modes add to a trained projector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from llava_steering_plugin.modes.base import DecoderShape, Mode


@dataclass(frozen=True)
class Projector(Mode):
    """Builds no modules: what is trained are the parameters between vision tower and decoder."""

    name: ClassVar[str] = "projector"
    idle_at_decode: ClassVar[bool] = True
    projector_alone: ClassVar[bool] = True

    def build(self, decoder: DecoderShape) -> dict[str, nn.Module]:
        return {}
