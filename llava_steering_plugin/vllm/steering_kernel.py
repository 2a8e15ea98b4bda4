"""The update of MoReS as a Triton kernel, for GPUs: what `steering_op.steer` does, with nothing read by the host.

A program takes a few tokens that follow each other. It goes through the slots, and computes those that any of its
tokens has: a prompt's tokens stand together, so that is one, or two where prompts meet. Where no token is steered, as
in decode steps, it ends after it has looked. What is launched depends on shapes alone, so a CUDA graph can hold it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TOKENS, WIDTH = 16, 64  # that a program holds at a time; `tl.dot` takes no fewer than 16 of anything


@triton.jit
def _steer(
    hidden,
    residual,
    slots,
    chosen,
    wanted,
    shift,
    offset,
    basis,
    ranks,
    count,
    width,
    hidden_stride,
    residual_stride,
    slot_count,
    largest_rank,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    present = tokens < count
    slot_of = tl.load(slots + tokens, mask=present, other=-1)
    bits = tl.load(chosen + tokens, mask=present, other=0)
    if tl.max(slot_of) >= 0:
        rank = tl.arange(0, RANKS)
        columns = tl.arange(0, WIDTH)
        for slot in range(slot_count):
            mine = (slot_of == slot) & ((bits & tl.load(wanted + slot)) != 0)
            if tl.max(mine.to(tl.int32)) > 0:
                used = rank < tl.load(ranks + slot)
                rows = (slot * largest_rank + rank).to(tl.int64) * width
                # M h + b
                inside = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
                for start in range(0, width, WIDTH):
                    here = start + columns < width
                    at = mine[:, None] & here[None, :]
                    states = tl.load(hidden + tokens[:, None] * hidden_stride + (start + columns)[None, :], mask=at)
                    rest = tl.load(residual + tokens[:, None] * residual_stride + (start + columns)[None, :], mask=at)
                    states = (states.to(tl.float32) + rest.to(tl.float32)).to(states.dtype)
                    states = tl.where(at, states, 0.0).to(tl.float32)
                    weight = tl.load(
                        shift + rows[:, None] + (start + columns)[None, :],
                        mask=used[:, None] & here[None, :],
                        other=0.0,
                    )
                    inside += tl.dot(states, tl.trans(weight), input_precision="ieee")
                inside += tl.load(offset + slot * largest_rank + rank, mask=used, other=0.0)[None, :]
                # h + R^T of that
                for start in range(0, width, WIDTH):
                    here = start + columns < width
                    at = mine[:, None] & here[None, :]
                    place = hidden + tokens[:, None] * hidden_stride + (start + columns)[None, :]
                    beside = residual + tokens[:, None] * residual_stride + (start + columns)[None, :]
                    states, rest = tl.load(place, mask=at), tl.load(beside, mask=at)
                    states = (states.to(tl.float32) + rest.to(tl.float32)).to(states.dtype)
                    weight = tl.load(
                        basis + rows[:, None] + (start + columns)[None, :],
                        mask=used[:, None] & here[None, :],
                        other=0.0,
                    )
                    update = tl.dot(inside, weight, input_precision="ieee").to(states.dtype)
                    steered = (states.to(tl.float32) + update.to(tl.float32)).to(states.dtype)
                    tl.store(place, steered, mask=at)
                    tl.store(beside, tl.zeros_like(steered), mask=at)


def steer(
    hidden: Tensor,
    residual: Tensor,
    slots: Tensor,
    chosen: Tensor,
    wanted: Tensor,
    shift: Tensor,
    offset: Tensor,
    basis: Tensor,
    ranks: Tensor,
) -> None:
    """Do what `steering_op.steer` does, with the same arguments; rows of `hidden` and `residual` are contiguous."""
    count, width = hidden.shape
    slot_count, largest_rank = offset.shape
    if not count:
        return
    _steer[(triton.cdiv(count, TOKENS),)](
        hidden,
        residual,
        slots,
        chosen,
        wanted,
        shift,
        offset,
        basis,
        ranks,
        count,
        width,
        hidden.stride(0),
        residual.stride(0),
        slot_count,
        largest_rank,
        TOKENS=TOKENS,
        WIDTH=WIDTH,
        RANKS=max(16, triton.next_power_of_2(largest_rank)),
    )
