"""The kernel for GPUs computes what the operator in torch does. Triton's interpreter runs it, on the CPU.

Covers `vllm/steering_kernel.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, whose interpreter runs the kernel: scripts/setup.sh --vllm has it")

Parts = dict[str, Tensor]


def parts(count: int, width: int, ranks: list[int], dtype: torch.dtype, *, largest: int = 8) -> Parts:
    """The arguments of `steer`: prompts of several adapters and of none, one after the other, as in a batch."""
    generator = torch.Generator().manual_seed(count + width)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    slots, longest = [], max(1, count // 4)
    while len(slots) < count + 8:  # longer than the batch: what stands behind is of an older one
        slot, length = torch.randint(0, 1 << 20, (2,), generator=generator).tolist()
        slots += [slot % (len(ranks) + 1) - 1] * (1 + length % longest)
    given = {
        "hidden": random(count, width).to(dtype),
        "residual": random(count, width).to(dtype),
        "slots": torch.tensor(slots[: count + 8]),
        "chosen": torch.randint(0, 4, (count + 8,), generator=generator),
        "wanted": torch.tensor([slot % 3 for slot in range(len(ranks))]),  # one in three steers nothing here
        "shift": random(len(ranks), largest, width) / width**0.5,
        "offset": random(len(ranks), largest),
        "basis": random(len(ranks), largest, width) / width**0.5,
        "ranks": torch.tensor(ranks),
    }
    for slot, rank in enumerate(ranks):  # rows behind a rank are nobody's
        for name in ("shift", "offset", "basis"):
            given[name][slot, rank:] = torch.nan
    return given


def interpreted(given: Parts) -> tuple[Tensor, Tensor]:
    """What the kernel makes of hidden and residual."""
    from llava_steering_plugin.vllm.steering_kernel import steer

    steer(**given)
    return given["hidden"], given["residual"]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process of its own: Triton reads the variable when it is imported, and vLLM imports it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, get_context("spawn"))
        pool.submit(os.getpid).result(timeout=120)  # it is started with the first
    with pool:
        yield pool


def compare(interpreter: ProcessPoolExecutor, given: Parts) -> int:
    """Compare both; returns how many tokens are steered."""
    from llava_steering_plugin.vllm.steering_op import steer

    # Copies: torch gives the other process the memory itself.
    copies = {name: value.clone() for name, value in given.items()}
    found, rest = interpreter.submit(interpreted, copies).result(timeout=120)
    before = given["hidden"].clone(), given["residual"].clone()
    steer(**given)
    steered = (given["residual"] != before[1]).any(1)
    # The sums are taken in another order, which turns the last digit of few values in half precision. And Triton's
    # interpreter cuts float32 to bfloat16, where GPUs and torch round: once the update, and once the state.
    dtype, exact = given["hidden"].dtype, {"atol": 1e-5, "rtol": 1e-5}
    digit = torch.finfo(dtype).eps
    close = exact if dtype == torch.float32 else {"atol": 4 * digit, "rtol": 2 * digit}
    torch.testing.assert_close(found, given["hidden"], **close)
    if dtype == torch.float16:
        assert (found != given["hidden"]).sum() <= 0.01 * found.numel()
    assert torch.equal(rest, given["residual"])
    assert torch.equal(found[~steered], before[0][~steered]) and torch.equal(rest[~steered], before[1][~steered])
    return int(steered.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("count", "width"), [(1, 64), (16, 48), (37, 200), (130, 96)])
def test_the_kernel_computes_what_torch_does(
    interpreter: ProcessPoolExecutor, count: int, width: int, dtype: torch.dtype
) -> None:
    steered = compare(interpreter, parts(count, width, [4, 2, 8, 1, 3], dtype))
    assert count == 1 or 0 < steered < count


@pytest.mark.parametrize("rank", range(1, 9))
def test_every_rank_is_computed_whole(interpreter: ProcessPoolExecutor, rank: int) -> None:
    given = parts(21, 72, [rank], torch.float32)
    given["wanted"][:] = 1
    assert compare(interpreter, given)


def test_more_than_sixteen_ranks_are_computed(interpreter: ProcessPoolExecutor) -> None:
    given = parts(20, 64, [24, 17], torch.float32, largest=24)
    given["wanted"][:] = 1
    assert compare(interpreter, given)


def test_decode_steps_leave_everything_alone(interpreter: ProcessPoolExecutor) -> None:
    given = parts(20, 64, [4], torch.float32)
    given["slots"].fill_(-1)
    assert compare(interpreter, given) == 0


def test_a_batch_may_be_empty(interpreter: ProcessPoolExecutor) -> None:
    assert compare(interpreter, parts(0, 64, [4], torch.float32)) == 0


@pytest.mark.parametrize(("dtype", "capability"), [("fp32", 80), ("bf16", 90)])
def test_the_kernel_can_be_compiled_for_gpus(dtype: str, capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llava_steering_plugin.vllm import steering_kernel

    kernel: Any = steering_kernel._steer
    sizes = {"TOKENS": steering_kernel.TOKENS, "WIDTH": steering_kernel.WIDTH, "RANKS": 16}
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(sizes, "constexpr")
    types |= dict.fromkeys(("slots", "chosen", "wanted", "ranks"), "*i64")
    types |= dict.fromkeys(("shift", "offset", "basis"), "*fp32")
    types |= dict.fromkeys(("hidden", "residual"), f"*{dtype}")
    made = triton.compile(ASTSource(kernel, types, constexprs=sizes), target=GPUTarget("cuda", capability, 32))
    assert f"sm_{capability}" in made.asm["ptx"] and made.asm["cubin"]
