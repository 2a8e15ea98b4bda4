"""Pixel shuffle (InternVL, arXiv 2404.16821): `factor` x `factor` neighbouring tokens are put side by side in one.

Nothing is lost, as it is with the mean: the token is `factor` ** 2 times as wide. A layer norm and an MLP follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from llava_steering_plugin.components.base import ImageTokens
from llava_steering_plugin.components.connectors.mlp import as_weights, mlp
from llava_steering_plugin.components.connectors.squares import OfSquares, as_image, as_tokens


class Shuffled(nn.Module):
    """Puts neighbours side by side, then projects.

    Shapes:
        features: [images, side * side, inputs] to [images, (side / factor) ** 2, width].
    """

    def __init__(self, factor: int, inputs: int, width: int):
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(factor)
        self.norm = nn.LayerNorm(inputs * factor**2)
        self.mlp = mlp(inputs * factor**2, width)

    def forward(self, features: Tensor) -> Tensor:
        joined = as_tokens(self.unshuffle(as_image(as_weights(features, self.norm))))
        projected: Tensor = self.mlp(self.norm(joined))
        return projected


@dataclass(frozen=True)
class PixelShuffle(OfSquares):
    """Describes pixel shuffle."""

    name: ClassVar[str] = "pixel-shuffle"
    summary: ClassVar[str] = "neighbouring tokens side by side in one, then a norm and mlp2x_gelu"

    def build(self, tokens: ImageTokens, width: int) -> nn.Module:
        """Return the module."""
        return Shuffled(self.factor, tokens.width, width)
