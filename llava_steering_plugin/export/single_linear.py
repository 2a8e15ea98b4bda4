"""The projector of one linear: transformers has two, of which the second then changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llava_steering_plugin.convert.torch_files import Weights
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.export import tensor_names
from llava_steering_plugin.export.streaming import Piece


def identity(width: int, weights: Weights) -> list[Piece]:
    """Return a second linear that changes nothing, behind the only one of a LLaVA."""
    name = next(name for name in weights if name.startswith("model.mm_projector."))
    dtype = weights[name].dtype
    made = {"weight": torch.eye(width, dtype=dtype), "bias": torch.zeros(width, dtype=dtype)}
    return [
        Piece(
            f"{tensor_names.PROJECTOR}.linear_2.{key}",
            None,
            "",
            _made(value),
            tuple(value.shape),
            value.numel() * value.element_size(),
        )
        for key, value in made.items()
    ]


def _made(value: Tensor) -> Callable[[Tensor], Tensor]:
    def change(_: Tensor) -> Tensor:
        return value

    return change


def check_identity(name: str, tensor: Tensor) -> None:
    same = torch.zeros_like(tensor) if tensor.ndim == 1 else torch.eye(*tensor.shape, dtype=tensor.dtype)
    if tensor.shape != same.shape or not torch.equal(tensor, same):
        raise ArgumentsError(
            f"{name} was trained: with nothing between them, the two linears of this projector are no MLP and no "
            "single linear of LLaVA's."
        )


def renamed(each: Piece) -> Piece:
    """Return a piece of the only linear by its name in an mlp1x_gelu."""
    found = each.target.removeprefix("model.mm_projector.")
    if found == each.target:
        return each
    return Piece(f"model.mm_projector.0.{found}", each.source, each.name, each.change, each.shape, each.size)
