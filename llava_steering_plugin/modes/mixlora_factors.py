"""Compute MixLoRA's low-rank update with the factors chosen for every row (arXiv 2402.15896, sec. 3).

No tensor of shape [rows, in, out] is made. Linears that are called on one tensor share the first of the two products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Gates(NamedTuple):
    """Holds what lets routers learn: a straight-through gate of 1 + p - stopgrad(p) on every chosen factor.

    Attributes:
        chosen: the A and the B factors, int64 [rows, linears, r] each.
        scores: of all factors, float32 [rows, linears, E] for each side. A score times the side's `shares` is p.
        shares: 1 on the side of A, 1 / (1 + w) on that of B with conditional selection.
        balance: returns a further gradient of p, float32 [2, rows or 1, linears, E]; None: there is none.
    """

    chosen: tuple[Tensor, Tensor]
    scores: tuple[Tensor, Tensor]
    shares: tuple[float, float]
    balance: Callable[[], Tensor] | None

    def of(self, linear: int) -> Gates:
        """Return those of one of the linears, by its number."""
        chosen, scores = (tuple(each.narrow(1, linear, 1) for each in both) for both in (self.chosen, self.scores))
        balance = self.balance
        one = None if balance is None else lambda: balance().narrow(2, linear, 1)
        return Gates((chosen[0], chosen[1]), (scores[0], scores[1]), self.shares, one)


def narrowed(hidden: Tensor, a: Tensor, gates: Gates | None = None) -> tuple[Tensor, Tensor]:
    """Return the hidden states themselves, and their products with the chosen A factors.

    What goes on with the hidden states should go on with those that are returned: their gradient then comes to the
    product, which writes its own part into it.

    Args:
        hidden: [rows, positions, in].
        a: chosen factors of all linears that are called on `hidden`, [rows, linears * r, in] in the same dtype.
        gates: give the routers' scores a gradient.

    Returns:
        [rows, positions, in] and [rows, linears * r, positions].
    """
    if not torch.is_grad_enabled():  # at decode steps, autograd's part would take as long as the products
        return hidden, torch.bmm(a, hidden.transpose(1, 2))
    scores = (None, None) if gates is None else gates.scores
    same, narrow = _Narrowed.apply(hidden, a, *scores, gates)  # type: ignore[no-untyped-call]
    return same if hidden.requires_grad else hidden, narrow


class _Narrowed(torch.autograd.Function):
    """Compute the first product, with a backward of its own: the narrow tensors have shape [..., positions].

    With autograd's backward, half of the products have a transposed narrow operand and take three times as long, and
    the input's gradient is made as a second tensor of its size, only to be added to the first.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, a: Tensor, scores_a: Tensor | None, scores_b: Tensor | None, gates: Gates | None
    ) -> tuple[Tensor, Tensor]:
        narrow = torch.bmm(a, hidden.transpose(1, 2))
        same = hidden.view_as(hidden)
        ctx.set_materialize_grads(False)
        ctx.shares, ctx.balance = (gates.shares, gates.balance) if gates is not None else ((), None)
        ctx.save_for_backward(hidden, a, narrow, *((*gates.chosen, scores_a, scores_b) if gates is not None else ()))
        return same, narrow

    @staticmethod
    def backward(ctx: Any, whole: Tensor | None, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return whole, None, None, None, None
        if torch.is_grad_enabled():
            return *_differentiable(ctx, whole, gradient), None
        hidden, a, narrow, *rest = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            wide = gradient.transpose(1, 2)
            # In place: nobody else has seen this gradient.
            whole = torch.bmm(wide, a) if whole is None else whole.baddbmm_(wide, a)
        for_a = torch.bmm(gradient, hidden) if ctx.needs_input_grad[1] else None
        return whole, for_a, *(_for_scores(ctx, rest, narrow, gradient) if rest else (None, None)), None


def _for_scores(ctx: Any, rest: list[Tensor], narrow: Tensor, gradient: Tensor) -> list[Tensor]:
    """Return the gradients of both sides' scores, float32 [rows, linears, E] each.

    The k-th A goes with the k-th B: a gate on either scales one and the same product, so both get the same gradient.
    """
    *chosen, scores, _ = rest
    wide = torch.float64 if narrow.dtype == torch.float64 else torch.float32
    worth = (narrow.to(wide).unsqueeze(-2) @ gradient.to(wide).unsqueeze(-1)).view(chosen[0].shape).float()
    base = scores.new_zeros(2, 1, 1, scores.shape[-1]) if ctx.balance is None else ctx.balance()
    sides = zip(base, chosen, ctx.shares, strict=True)
    of_p = [(own.expand(scores.shape).scatter_add(-1, each, worth), share) for own, each, share in sides]
    return [gradient if share == 1 else gradient * share for gradient, share in of_p]


def _differentiable(ctx: Any, whole: Tensor | None, gradient: Tensor) -> list[Tensor | None]:
    """Return the same gradients with a history, for second derivatives: of the gates as they are written."""
    hidden, a, _, *rest = ctx.saved_tensors
    chosen, scores = rest[:2], rest[2:]
    narrow = torch.bmm(a, hidden.transpose(1, 2))
    for each, score, share in zip(chosen, scores, ctx.shares, strict=True):
        p = (score * share).gather(-1, each).flatten(1).unsqueeze(-1)
        narrow = narrow * (1 + p - p.detach()).to(narrow.dtype)
    inputs = [hidden, a, *scores]
    asked = [each for each, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
    made = iter(torch.autograd.grad(narrow, asked, gradient, create_graph=True))
    found = [next(made) if needed else None for _, needed in zip(range(4), ctx.needs_input_grad, strict=False)]
    if found[0] is not None and whole is not None:
        found[0] = found[0] + whole
    if ctx.balance is not None:
        own = zip(found[2:], ctx.balance(), ctx.shares, strict=True)
        found[2:] = [each if each is None else each + balance * share for each, balance, share in own]
    return found


class _Updated(torch.autograd.Function):
    """Add the second product to an output. Given the linear's weight, the backward is that of the linear as well."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, hidden: Tensor | None, narrow: Tensor, b: Tensor, scale: float, weight: Tensor | None
    ) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(narrow, b, weight)
        ctx.mark_dirty(output)
        return output.baddbmm_(narrow.transpose(1, 2), b, alpha=scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        narrow, b, weight = ctx.saved_tensors
        # With beta = 0 the first argument lends its shape alone, and the scale costs no operation.
        for_narrow = torch.baddbmm(narrow, b, gradient.transpose(1, 2), beta=0, alpha=ctx.scale)
        for_b = None
        if ctx.needs_input_grad[3]:
            for_b = torch.baddbmm(b, narrow, gradient, beta=0, alpha=ctx.scale)
        for_hidden = None
        if ctx.needs_input_grad[1] and weight is not None:
            for_hidden = torch.mm(gradient.reshape(-1, gradient.shape[-1]), weight)
            for_hidden = for_hidden.view(*gradient.shape[:-1], -1)
        return gradient if weight is None else None, for_hidden, for_narrow, for_b, None, None


def updated(
    output: Tensor, narrow: Tensor, b: Tensor, scale: float, hidden: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Add scale * narrow^T b to `output` in place and return it, [rows, positions, out].

    In place because a copy of `output`, which its linear has just made and needs no more, takes longer than the update.

    Args:
        output: [rows, positions, out] in any float dtype.
        narrow: [rows, r, positions] in the same dtype.
        b: chosen factors, [rows, r, out] in the same dtype. The scale is not in them: it is applied where sums are in
            float32.
        scale: alpha / r.
        hidden, weight: the linear's input and its frozen weight [out, in], if its backward pass is to be done here;
            `output` is detached then.
    """
    if not torch.is_grad_enabled():
        return output.baddbmm_(narrow.transpose(1, 2), b, alpha=scale)
    if output._is_view():
        # Autograd forbids writing into a view that another function's forward has made, such as the output of
        # bitsandbytes' 8-bit linears. It looks like an ordinary view, such as that of a linear with a bias: copy both.
        output = output.clone()
    result: Tensor = _Updated.apply(output, hidden, narrow, b, scale, weight)  # type: ignore[no-untyped-call]
    return result
