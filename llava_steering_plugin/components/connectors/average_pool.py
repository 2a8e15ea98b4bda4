"""Average pooling: `factor` x `factor` neighbouring tokens become their mean, and an MLP follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from llava_steering_plugin.components.base import ImageTokens
from llava_steering_plugin.components.connectors.mlp import mlp
from llava_steering_plugin.components.connectors.squares import OfSquares, as_image, as_tokens


class Pooled(nn.Module):
    """Takes means of neighbours, then projects.

    Shapes:
        features: [images, side * side, inputs] to [images, (side / factor) ** 2, width].
    """

    def __init__(self, factor: int, inputs: int, width: int):
        super().__init__()
        self.pool = nn.AvgPool2d(factor)
        self.mlp = mlp(inputs, width)

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.mlp(as_tokens(self.pool(as_image(features))))
        return projected


@dataclass(frozen=True)
class AveragePool(OfSquares):
    """Describes average pooling."""

    name: ClassVar[str] = "avgpool"
    summary: ClassVar[str] = "mean of neighbouring tokens, then mlp2x_gelu"

    def build(self, tokens: ImageTokens, width: int) -> nn.Module:
        """Return the module."""
        return Pooled(self.factor, tokens.width, width)
