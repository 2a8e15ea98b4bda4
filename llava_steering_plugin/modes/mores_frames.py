"""Make the orthonormal rows R of MoReS' layers, all at once (LLaVA Steering, arXiv 2412.12359, eq. 3-4).

    R = L^-1 raw,   L L^T = raw raw^T

Only the d x d Gram matrix is factored. R does not depend on the length of raw's rows, so weight decay cannot shrink it
and no optimizer step can make it less orthonormal. Each layer is a small problem, and a GPU takes as long to start one
as to solve it: those of all layers are one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from llava_steering_plugin.distributed import is_partitioned
from llava_steering_plugin.modes.base import ForwardPass, has_float64


class Framed(Protocol):
    """A module whose basis is made from a parameter, [rank, D], beside those of others."""

    training: bool
    frames: Frames

    @property
    def steer_basis(self) -> nn.Parameter: ...


class Frame(NamedTuple):
    """Holds what is computed from raw.

    Attributes:
        basis: R, float32 [..., rank, D].
        inverse: L^-1, float32 [..., rank, rank].
        lower: bool [rank, rank], True in the lower triangle.
    """

    basis: Tensor
    inverse: Tensor
    lower: Tensor


def orthonormal(raw: Tensor) -> Frame:
    """Return the frame of one layer or, with a leading dimension, of several; with gradients, in torch's own way.

    Float64 because float32 loses 1e-5 of orthonormality at a condition number of 100; `cholesky_ex` because the plain
    call waits for the device to report success. On the CPU where the device has no float64 (MPS): the d rows are few
    numbers to move.

    Args:
        raw: [rank, D] or [layers, rank, D] in any float dtype.
    """
    device = raw.device
    rows = raw.to(device if has_float64(device) else torch.device("cpu")).double()
    rank = rows.shape[-2]
    factor = torch.linalg.cholesky_ex(rows @ rows.mT).L
    identity = torch.eye(rank, dtype=rows.dtype, device=rows.device).expand(*rows.shape[:-1], rank)
    solved = torch.linalg.solve_triangular(factor, torch.cat([rows, identity], -1), upper=False)
    # Row by row, as LAPACK does not leave it: otherwise the gradient of R is a product that takes CPUs five times as
    # long as any other of a layer.
    solved = solved.to(torch.float32, memory_format=torch.contiguous_format).to(device)
    lower = torch.ones(rank, rank, dtype=torch.bool, device=rows.device).tril().to(device)
    return Frame(solved[..., :-rank], solved[..., -rank:], lower)


def is_unchanged(parameter: Tensor, alias: Tensor, version: int) -> bool:
    """Say whether a parameter is still the memory that `alias` holds, with nothing written to it since.

    Args:
        alias: `parameter.detach()`, made when what is kept was computed. While it is held, no other memory gets its
            address.
        version: torch's count of changes then. A write through `.data` is not in it.
    """
    same = parameter.data_ptr() == alias.data_ptr() and parameter.device == alias.device
    return same and parameter.dtype == alias.dtype and parameter._version == version


class Basis(torch.autograd.Function):
    """Return R, which was made with those of other layers; take its gradient back to the layer's own parameter.

    For X = L^-1 d raw, d R = X - Phi(X R^T + R X^T) R, where Phi takes the lower triangle with half of the diagonal. So
    the gradient G of R becomes L^-T (G - S R), where S is symmetric and has the lower triangle of G R^T. Each layer has
    its own: with gradient checkpointing, no layer can wait for the gradients of the others.
    """

    @staticmethod
    def forward(ctx: Any, raw: Tensor, basis: Tensor, inverse: Tensor, lower: Tensor) -> Tensor:
        ctx.save_for_backward(raw, basis, inverse, lower)
        return basis.view_as(basis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        raw, basis, inverse, lower = ctx.saved_tensors
        if torch.is_grad_enabled():  # this backward pass is to be differentiated, and what was made has no history
            basis, inverse, _ = orthonormal(raw)
        along = gradient @ basis.T
        outside = torch.addmm(gradient, torch.where(lower, along, along.T), basis, alpha=-1)
        return (inverse.T @ outside).to(raw.dtype), None, None, None


class Frames:
    """Makes the frames of several layers in one factorisation.

    In training once a pass. In evaluation they are kept until a parameter changes: until other memory takes its place,
    torch has counted a change of it, or a module is moved or told to train or to evaluate. Only a write through `.data`
    in the midst of an evaluation is not seen.

    Args:
        steerings: the modules of all layers, whose parameters have one shape.
    """

    def __init__(self, steerings: Sequence[Framed]):
        self.steerings = tuple(steerings)
        self._kept: dict[Framed, tuple[Tensor, int, Frame]] = {}

    def of(self, steering: Framed, this_pass: ForwardPass) -> Frame:
        """Return the frame of one layer, without a gradient."""
        raw = steering.steer_basis
        with torch.no_grad():
            if is_partitioned(raw):  # whole only while its own layer runs
                return orthonormal(raw)
            if steering.training or raw.is_inference():
                made = this_pass.once(("mores frames", self, raw.device), lambda: self._made(raw.device))
                return made[steering]
            if not self._is_kept(steering):
                # Outside of inference mode: a later pass may need gradients.
                with torch.inference_mode(False), torch.no_grad():
                    for each, frame in self._made(raw.device).items():
                        alias = each.steer_basis.detach()
                        self._kept[each] = alias, alias._version, frame
            return self._kept[steering][2]

    def forget(self, steering: Framed) -> None:
        """Drop what is kept of one layer."""
        self._kept.pop(steering, None)

    def _is_kept(self, steering: Framed) -> bool:
        if steering not in self._kept:
            return False
        alias, version, _ = self._kept[steering]
        return is_unchanged(steering.steer_basis, alias, version)

    def _made(self, device: torch.device) -> dict[Framed, Frame]:
        here = [each for each in self.steerings if each.steer_basis.device == device]
        basis, inverse, lower = orthonormal(torch.stack([each.steer_basis for each in here]))
        return {each: Frame(basis[number], inverse[number], lower) for number, each in enumerate(here)}
