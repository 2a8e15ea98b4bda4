"""Perceiver resampler (Flamingo, arXiv 2204.14198): learned latents read image and one another.

The module is transformers' IdeficsPerceiverResampler; a linear to the language model's width follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from llava_steering_plugin.components.base import Connector, ImageTokens, setting
from llava_steering_plugin.components.connectors.mlp import as_weights


class Resampled(nn.Module):
    """Resamples the tokens of a tower, and projects.

    Shapes:
        features: [images, tokens, inputs] to [images, queries, width].
    """

    def __init__(self, resampler: nn.Module, inputs: int, width: int):
        super().__init__()
        self.resampler = resampler
        self.out = nn.Linear(inputs, width)

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.out(self.resampler(as_weights(features, self.resampler)))
        return projected


@dataclass(frozen=True)
class Resampler(Connector):
    """Describes a resampler; IDEFICS' defaults."""

    name: ClassVar[str] = "resampler"
    summary: ClassVar[str] = "learned latents read the image (transformers' IdeficsPerceiverResampler)"
    queries: int = setting(64, "tokens that an image becomes")
    layers: int = setting(6, "layers")
    heads: int = setting(16, "attention heads")
    head_width: int = setting(96, "width of a head")

    def problems(self, tokens: ImageTokens, width: int) -> list[str]:
        """Return what is wrong with the settings: the image may have any size."""
        low = {name: value for name, value in vars(self).items() if value < 1}
        return [f"resampler: {name} is {value}; it must be at least 1" for name, value in low.items()]

    def tokens(self, tokens: ImageTokens, width: int) -> ImageTokens:
        """Return one token a latent; none has a place in the image."""
        return ImageTokens(self.queries, width)

    def build(self, tokens: ImageTokens, width: int) -> nn.Module:
        """Return the module."""
        from transformers import IdeficsConfig
        from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

        config = IdeficsConfig(vision_config={"embed_dim": tokens.width})
        resampler = IdeficsPerceiverResampler(
            config, tokens.width, self.layers, self.heads, self.head_width, self.queries
        )
        return Resampled(resampler, tokens.width, width)
