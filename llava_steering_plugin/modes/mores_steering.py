"""Compute the update of MoReS (LLaVA Steering, arXiv 2412.12359, eq. 3-4): R^T (M h + b), within the rows of R."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.modes.base import ForwardPass, no_autocast
from llava_steering_plugin.modes.mores_frames import Basis, Frames, orthonormal


class Steering(nn.Module):
    """Computes the update R^T (M h + b) of hidden states h (eq. 3-4), inside a learned `rank`-dimensional subspace.

    Args:
        hidden_size: D, width of the residual stream.
        rank: d <= D, dimension of the subspace; 1 is the paper's smallest setting.
        dropout: probability of dropping an element of the update while training.

    Shapes:
        hidden: [tokens, D] in any float dtype. Computed in float32; the update, without h, has the input's dtype.
    """

    def __init__(self, hidden_size: int, rank: int, dropout: float = 0.0):
        super().__init__()
        self.steer_basis = nn.Parameter(torch.empty(rank, hidden_size, dtype=torch.float32))
        self.steer_shift = nn.Parameter(torch.zeros(rank, hidden_size, dtype=torch.float32))
        self.steer_offset = nn.Parameter(torch.zeros(rank, dtype=torch.float32))
        self.dropout = nn.Dropout(dropout)
        nn.init.orthogonal_(self.steer_basis)
        self.frames = Frames([self])

    def basis(self, this_pass: ForwardPass | None = None) -> Tensor:
        """Return R, float32 [rank, D] with orthonormal rows, made from the unconstrained parameter.

        Args:
            this_pass: in which those of all layers are made at once.
        """
        made = orthonormal(self.steer_basis) if this_pass is None else self.frames.of(self, this_pass)
        basis: Tensor = Basis.apply(self.steer_basis, *made)  # type: ignore[no-untyped-call]
        return basis

    def forward(self, hidden: Tensor, this_pass: ForwardPass | None = None) -> Tensor:
        with no_autocast(hidden.device):
            shifted = nn.functional.linear(hidden.float(), self.steer_shift.float(), self.steer_offset.float())
            update: Tensor = self.dropout(shifted @ self.basis(this_pass))
        return update.to(hidden.dtype)

    def train(self, mode: bool = True) -> Steering:
        self.frames.forget(self)  # some optimizers write through `.data`, which torch does not count as a change
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.frames.forget(self)  # what was kept would stay behind on another device
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def set_paper_weights(self, rotation: Tensor, weight: Tensor, offset: Tensor) -> None:
        """Set the parameters from the paper's R [rank, D] with orthonormal rows, W [rank, D] and b [rank]."""
        self.steer_basis.copy_(rotation)
        # R as `basis()` returns it, so that M + R is the given W to the last bit that float32 holds.
        self.steer_shift.copy_(weight - self.basis())
        self.steer_offset.copy_(offset)


class Pick(torch.autograd.Function):
    """Return the hidden states, and a copy of those that are to be updated.

    `index_select` alone does the same, but its gradient is as large as all hidden states and zero except for a few
    rows, and autograd adds it to theirs: more memory traffic than all the rest of MoReS' backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(chosen)
        return hidden.view_as(hidden), hidden.index_select(0, chosen)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (chosen,) = ctx.saved_tensors
        whole, picked = gradients
        return whole.index_add(0, chosen, picked), None
