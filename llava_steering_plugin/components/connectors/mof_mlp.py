"""Interleaved mixture of features (Eyes Wide Shut, arXiv 2401.06209): an MLP for each tower, tokens in turns.

The tower gives the features of both towers side by side in each token (`--vision_tower mof:...`). Each half has its own
MLP; at each place of the image the first tower's token comes first, and the second's follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from llava_steering_plugin.components.base import Connector, ImageTokens
from llava_steering_plugin.components.connectors.mlp import mlp


class Interleaved(nn.Module):
    """Projects each tower's part of a token by an MLP of its own.

    Shapes:
        features: [images, tokens, sum of parts] to [images, parts * tokens, width].
    """

    def __init__(self, parts: tuple[int, ...], width: int):
        super().__init__()
        self.parts = parts
        self.mlps = nn.ModuleList(mlp(part, width) for part in parts)

    def forward(self, features: Tensor) -> Tensor:
        split = torch.split(features, list(self.parts), dim=-1)
        return torch.stack([each(part) for each, part in zip(self.mlps, split, strict=True)], dim=2).flatten(1, 2)


@dataclass(frozen=True)
class MofMlp(Connector):
    """Describes the connector of LLaVA-MoF."""

    name: ClassVar[str] = "mof-mlp"
    summary: ClassVar[str] = "an MLP for each tower of a mixture, their tokens in turns"

    def problems(self, tokens: ImageTokens, width: int) -> list[str]:
        """Return why there is nothing to interleave."""
        if len(tokens.parts) < 2:
            return ["mof-mlp interleaves the tokens of several towers; give --vision_tower mof:CLIP+DINOV2"]
        return []

    def tokens(self, tokens: ImageTokens, width: int) -> ImageTokens:
        """Return as many tokens for each place as there are towers, so that positions are no squares of the image."""
        return ImageTokens(tokens.count * len(tokens.parts), width)

    def build(self, tokens: ImageTokens, width: int) -> nn.Module:
        """Return the module."""
        return Interleaved(tokens.parts, width)
