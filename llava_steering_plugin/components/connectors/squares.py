"""Check and lay out tokens that stand for the squares of an image, for connectors that join neighbours."""

from __future__ import annotations

from torch import Tensor

from llava_steering_plugin.components.base import ImageTokens


def problems_of_squares(tokens: ImageTokens, factor: int, name: str) -> list[str]:
    """Return why neighbouring tokens cannot be joined, one sentence each.

    Args:
        factor: how many of a row, and of a column, become one.
        name: of the connector.
    """
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
            f"{name}: factor is {factor}, and the tower gives {tokens.side} x {tokens.side} tokens, which it does not "
            "divide"
        ]
    return []


def as_image(features: Tensor) -> Tensor:
    """Lay [images, side * side, width] out as [images, width, side, side]."""
    images, tokens, width = features.shape
    side = round(tokens**0.5)
    return features.transpose(1, 2).reshape(images, width, side, side)


def as_tokens(image: Tensor) -> Tensor:
    """Return [images, width, side, side] as [images, side * side, width], row by row."""
    return image.flatten(2).transpose(1, 2)
