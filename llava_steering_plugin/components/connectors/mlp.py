"""Build the two-layer perceptron that ends several connectors, LLaVA-1.5's mlp2x_gelu; and feed a norm."""

from __future__ import annotations

from torch import Tensor, nn


def mlp(inputs: int, width: int) -> nn.Sequential:
    """Return linear, GELU, linear: [.., inputs] to [.., width]."""
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))


def as_weights(features: Tensor, module: nn.Module) -> Tensor:
    """Return features in the dtype of a module's weights.

    A training has them in float32 and may have the connector in bfloat16: autocast casts what goes into a linear, and
    on the CPU not what goes into a norm.
    """
    return features.to(next(module.parameters()).dtype)
