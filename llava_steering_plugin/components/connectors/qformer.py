"""Q-Former (BLIP-2, arXiv 2301.12597): learned queries read an image by cross attention.

The module is transformers' Blip2QFormerModel with BLIP-2's sizes and without dropout. It is trained from scratch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from llava_steering_plugin.components.base import Connector, ImageTokens, setting


class Queried(nn.Module):
    """Lets queries read the tokens of a tower, and projects what they have become.

    Shapes:
        features: [images, tokens, inputs] to [images, queries, width].
    """

    def __init__(self, former: nn.Module, queries: int, hidden: int, width: int):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(1, queries, hidden).normal_(0, 0.02))
        self.former = former
        self.out = nn.Linear(hidden, width)

    def forward(self, features: Tensor) -> Tensor:
        queries = self.queries.expand(len(features), -1, -1)
        projected: Tensor = self.out(
            self.former(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        )
        return projected


@dataclass(frozen=True)
class QFormer(Connector):
    """Describes a Q-Former."""

    name: ClassVar[str] = "qformer"
    summary: ClassVar[str] = "learned queries read the image (transformers' Blip2QFormerModel)"
    queries: int = setting(32, "tokens that an image becomes")
    layers: int = setting(12, "layers; every second one reads the image")
    hidden: int = setting(768, "width inside")
    heads: int = setting(12, "attention heads")

    def problems(self, tokens: ImageTokens, width: int) -> list[str]:
        """Return what is wrong with the settings: the image may have any size."""
        low = {name: value for name, value in vars(self).items() if value < 1}
        found = [f"qformer: {name} is {value}; it must be at least 1" for name, value in low.items()]
        if not found and self.hidden % self.heads:
            found.append(f"qformer: hidden is {self.hidden}, which {self.heads} heads do not divide")
        return found

    def tokens(self, tokens: ImageTokens, width: int) -> ImageTokens:
        """Return one token a query; none has a place in the image."""
        return ImageTokens(self.queries, width)

    def build(self, tokens: ImageTokens, width: int) -> nn.Module:
        """Return the module."""
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        config = Blip2QFormerConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden,
            encoder_hidden_size=tokens.width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return Queried(Blip2QFormerModel(config), self.queries, self.hidden, width)
