"""Take factors out of MixLoRA's pools for every row, and compute the low-rank update (arXiv 2402.15896, sec. 3).

No tensor of shape [rows, in, out] is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_steering_plugin.modes.mixlora_routing import Choice


class _Take(torch.autograd.Function):
    """Take factors out of a pool, with a straight-through gate of 1 + p - stopgrad(p) on each.

    The forward value is the factor, bit for bit; the gate acts in the backward pass only, where p gets the gradient
    that a weight on the factor would have.
    """

    @staticmethod
    def forward(
        ctx: Any, pool: Tensor, probability: Tensor | None, index: Tensor, scale: float, dtype: torch.dtype
    ) -> Tensor:
        taken = pool.index_select(0, index.flatten()).view(*index.shape, -1)
        taken = (taken if scale == 1 else taken.float() * scale).to(dtype)
        ctx.scale, ctx.factors, ctx.dtype = scale, pool.shape[0], pool.dtype
        ctx.save_for_backward(index, taken if probability is not None else None)
        return taken

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        index, taken = ctx.saved_tensors
        gradient = gradient.float()
        for_pool = for_probability = None
        if ctx.needs_input_grad[0]:
            # A product with ones and zeros: scattered sums on CUDA have no fixed order, and two runs must agree.
            places = gradient.new_zeros(index.numel(), ctx.factors).scatter_(1, index.reshape(-1, 1), ctx.scale)
            for_pool = (places.T @ gradient.flatten(0, 1)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            weight = (gradient * taken).sum(-1)
            for_probability = weight.new_zeros(index.shape[0], ctx.factors).scatter_(1, index, weight)
        return for_pool, for_probability, None, None, None


def take(pool: Tensor, choice: Choice, dtype: torch.dtype, *, scale: float = 1.0, gated: bool = False) -> Tensor:
    """Return the chosen factors times `scale`, [rows, r, features].

    Args:
        pool: float32 [E, features].
        choice: the factors of every row, [rows, r].
        dtype: of the result.
        scale: is multiplied in float32, before the cast to `dtype`.
        gated: give the choice's probabilities a gradient through a straight-through gate.
    """
    probability = choice.probability if gated else None
    taken: Tensor = _Take.apply(pool, probability, choice.factors, scale, dtype)  # type: ignore[no-untyped-call]
    return taken


class _Updated(torch.autograd.Function):
    """Compute the low-rank update, with a backward of its own: the narrow tensors have shape [rows, r, positions].

    With autograd's backward, half of the products have a transposed narrow operand and take three times as long. Given
    the linear's weight, the backward is that of the linear and of the update in one: their parts of the input's
    gradient are then written into one tensor. Autograd would allocate a second one of the input's size, and read and
    write three of them for the sum.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, hidden: Tensor, a: Tensor, b: Tensor, weight: Tensor | None) -> Tensor:
        narrow = torch.bmm(a, hidden.transpose(1, 2))
        ctx.save_for_backward(hidden, a, b, narrow, weight)
        ctx.mark_dirty(output)
        return output.baddbmm_(narrow.transpose(1, 2), b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, a, b, narrow, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # this backward pass is to be differentiated, and `narrow` has no history
            narrow = torch.bmm(a, hidden.transpose(1, 2))
        for_narrow = torch.bmm(b, gradient.transpose(1, 2))
        for_hidden = None
        if ctx.needs_input_grad[1] and weight is not None:
            for_hidden = torch.mm(gradient.reshape(-1, gradient.shape[-1]), weight).view_as(hidden)
            for_hidden = for_hidden.baddbmm_(for_narrow.transpose(1, 2), a)
        elif ctx.needs_input_grad[1]:
            for_hidden = torch.bmm(for_narrow.transpose(1, 2), a)
        for_a = torch.bmm(for_narrow, hidden) if ctx.needs_input_grad[2] else None
        for_b = torch.bmm(narrow, gradient) if ctx.needs_input_grad[3] else None
        return gradient if weight is None else None, for_hidden, for_a, for_b, None


def updated(output: Tensor, hidden: Tensor, a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """Add (hidden a^T) b to `output` in place and return it, [rows, positions, out].

    In place because a copy of `output`, which its linear has just made and needs no more, takes longer than the update.

    Args:
        output: [rows, positions, out] in any float dtype.
        hidden: [rows, positions, in] in the same dtype.
        a: chosen factors, [rows, r, in] in the same dtype.
        b: chosen factors times alpha / r, [rows, r, out] in the same dtype.
        weight: [out, in] of the linear that has made `output` from `hidden`, frozen; `output` is detached then, and the
            result's gradient of `hidden` is that of both.
    """
    if torch.is_grad_enabled() and output._is_view():
        # Autograd forbids writing into a view that another function's forward has made, such as the output of
        # bitsandbytes' 8-bit linears. It looks like an ordinary view, such as that of a linear with a bias: copy both.
        output = output.clone()
    result: Tensor = _Updated.apply(output, hidden, a, b, weight)  # type: ignore[no-untyped-call]
    return result
