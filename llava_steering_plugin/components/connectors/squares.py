"""Share what connectors need that make one token of neighbours: a setting, its checks, the layout of an image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llava_steering_plugin.components.base import Connector, ImageTokens, setting


@dataclass(frozen=True)
class OfSquares(Connector):
    """Describes a connector that makes one token of `factor` x `factor` neighbours."""

    factor: int = setting(2, "tokens of a row, and of a column, that become one")

    def problems(self, tokens: ImageTokens, width: int) -> list[str]:
        """Return why neighbouring tokens cannot be joined, one sentence each."""
        name, factor = self.name, self.factor
        if factor < 1:
            return [f"{name}: factor is {factor}; it must be at least 1"]
        if tokens.side is None:
            return [
                f"{name} joins neighbouring squares of an image; the {tokens.count} tokens of this tower are no squares"
            ]
        if tokens.leading:
            return [f"{name} takes squares of the image alone; give --mm_vision_select_feature patch"]
        if tokens.side % factor:
            return [
                f"{name}: factor is {factor}, and the tower gives {tokens.side} x {tokens.side} tokens, which it does "
                "not divide"
            ]
        return []

    def tokens(self, tokens: ImageTokens, width: int) -> ImageTokens:
        """Return the tokens that are left; each stands for a larger square."""
        side = (tokens.side or 0) // self.factor
        return ImageTokens(side * side, width, side)


def as_image(features: Tensor) -> Tensor:
    """Lay [images, side * side, width] out as [images, width, side, side]."""
    images, tokens, width = features.shape
    side = round(tokens**0.5)
    return features.transpose(1, 2).reshape(images, width, side, side)


def as_tokens(image: Tensor) -> Tensor:
    """Return [images, width, side, side] as [images, side * side, width], row by row."""
    return image.flatten(2).transpose(1, 2)
