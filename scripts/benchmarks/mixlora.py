"""Measure the cost of MixLoRA beside the frozen linear, PEFT's LoRA of equal rank, and a dense-delta formulation.

Every layer runs in rounds with the frozen linear (its input has a gradient) and with that frozen linear a second time,
the control; it is compared with the mean of these two in the same round. Rounds go on until the 95 % interval of the
median lies on one side of the limit, or the time is up. Weights are shared and random, in LLaVA-1.5-7B's sizes. With
one thread (the default) processor time is measured, so that other processes count little. The criteria:

- forward + backward takes at most 5 % longer than the frozen linear, at 128 and 704 positions;
- a decode step of a block of seven linears takes at most 10 % longer;
- peak memory of forward + backward at 704 positions is at most PEFT's, gradients included;
- the floating-point operations equal the formulas exactly.

One position is timed and not judged: nobody trains on sequences of one, and there the fixed number of small operations
of routing stands against a matrix-vector product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from .mixlora_variants import RANK, SETTINGS, Block, block, forward_backward, layers, peak_bytes, trained
from .shared.machine import open_console, prepare
from .shared.timing import (
    REFERENCE,
    Samples,
    Timing,
    excesses,
    fair_clock,
    interleave,
    ratio_table,
    summarise,
    until_decided,
    with_reference,
)
from .shared.verdicts import Verdict, table_of, table_of_verdicts, write_json

FORWARD_BACKWARD_LIMIT, DECODE_LIMIT = 0.05, 0.10
JUDGED_POSITIONS = (128, 704)
# Both are shown, the longer one is judged: in the short one the gradients of factors and routers dominate.
MEMORY_POSITIONS = (128, 704)
DECODE_STEPS = 32
ROUNDS = 6  # that are added at a time
FROZEN, CONTROL, DENSE = "frozen", "control", "dense delta"


@dataclass(frozen=True)
class LinearCase:
    """One linear and one batch."""

    in_features: int
    out_features: int
    batch: int
    positions: int

    def __str__(self) -> str:
        return f"{self.in_features} x {self.out_features}, batch {self.batch}, {self.positions} positions"


def one_linear(case: LinearCase, dtype: torch.dtype, seconds: float) -> dict[str, Timing]:
    """Time forward + backward of every variant; the dense one, which is the slowest, in a few rounds of its own."""
    hidden = torch.randn(case.batch, case.positions, case.in_features, dtype=dtype).requires_grad_()
    gradient = torch.randn(case.batch, case.positions, case.out_features, dtype=dtype)
    made = layers(case.in_features, case.out_features, dtype)
    calls = {name: forward_backward(layer, hidden, gradient) for name, layer in made.items()}
    dense = {name: calls[name] for name in (FROZEN, CONTROL)} | {DENSE: calls.pop(DENSE)}
    limit = FORWARD_BACKWARD_LIMIT if case.positions in JUDGED_POSITIONS else None
    timings = _timings(calls, seconds, limit)
    beside = _summarised(interleave(dense, rounds=ROUNDS // 2, warmup=1, clock=fair_clock()))
    return {**timings, DENSE: beside[DENSE]}


def _timings(calls: dict[str, Callable[[], None]], seconds: float, limit: float | None) -> dict[str, Timing]:
    """Time the calls in rounds until MixLoRA is decided by the limit, or `seconds` are over.

    Args:
        limit: None if nothing is judged; a quarter of the time is then enough.
    """

    def judged(samples: Samples) -> dict[str, list[float]]:
        return {"mixlora": excesses(with_reference(samples, FROZEN, CONTROL), "mixlora")}

    seconds = seconds if limit is not None else seconds / 4
    return _summarised(until_decided(calls, judged, limit=limit, rounds=ROUNDS, seconds=seconds, clock=fair_clock()))


def _summarised(samples: Samples) -> dict[str, Timing]:
    return summarise(with_reference(samples, FROZEN, CONTROL), baseline=REFERENCE)


def decoding(
    positions: int, steps: int, dtype: torch.dtype, seconds: float
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Time the prefill of `positions` of a block of seven linears, and `steps` decode steps after it."""
    made: dict[str, Block] = block(dtype)
    width = made["frozen"].width
    prompt, token = torch.randn(1, positions, width, dtype=dtype), torch.randn(1, 1, width, dtype=dtype)

    @torch.no_grad()
    def prefill(block: Block) -> None:
        block.prefill(prompt)

    @torch.no_grad()
    def decode(block: Block) -> None:
        for _ in range(steps):
            block.decode(token)

    for variant in made.values():
        prefill(variant)
    before, after = (
        _timings({name: _call(phase, variant) for name, variant in made.items()}, seconds, limit)
        for phase, limit in ((prefill, None), (decode, DECODE_LIMIT))
    )
    return before, after


def _call(phase: Callable[[Block], None], variant: Block) -> Callable[[], None]:
    return lambda: phase(variant)


def adamw(rounds: int) -> dict[str, Timing]:
    """Time an AdamW step of the adapters of a whole block; the baseline is PEFT's LoRA of equal rank."""
    calls = {}
    for name, variant in block(torch.float32).items():
        parameters = list(trained(variant))
        if not parameters:
            continue
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer = torch.optim.AdamW(parameters)
        calls[f"{name}: {sum(parameter.numel() for parameter in parameters):,} parameters"] = _step(optimizer)
    baseline = next(name for name in calls if name.startswith("peft"))
    return summarise(interleave(calls, rounds=rounds, clock=fair_clock()), baseline=baseline)


def _step(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        optimizer.step()

    return step


def peak_memory(case: LinearCase, dtype: torch.dtype) -> dict[str, int]:
    """Return the peak bytes of forward + backward of each variant: with gradients, without weights and input."""
    hidden = torch.randn(case.batch, case.positions, case.in_features, dtype=dtype).requires_grad_()
    gradient = torch.randn(case.batch, case.positions, case.out_features, dtype=dtype)
    made = layers(case.in_features, case.out_features, dtype)
    return {name: peak_bytes(forward_backward(layer, hidden, gradient)) for name, layer in made.items()}


def flops(case: LinearCase, dtype: torch.dtype) -> dict[str, int]:
    """Count the floating-point operations of forward + backward with torch's counter."""
    hidden = torch.randn(case.batch, case.positions, case.in_features, dtype=dtype).requires_grad_()
    gradient = torch.randn(case.batch, case.positions, case.out_features, dtype=dtype)
    counted = {}
    for name, layer in layers(case.in_features, case.out_features, dtype).items():
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: _product}) as counter:
            forward_backward(layer, hidden, gradient)()
        counted[name] = int(counter.get_total_flops())
    return counted


def _product(_: torch.Size, a: torch.Size, b: torch.Size, **rest: Any) -> int:
    """Count a batched product that is added in place, which torch's counter does not know."""
    return 2 * a.numel() * b[-1]


def expected_flops(case: LinearCase) -> int:
    """Compute what MixLoRA adds to the frozen linear's forward + backward; torch counts matrix products only.

    n rows of p positions. Forward: the pooled mean 2 n p in, two routers 2 n in E each, the conditional one
    2 n r in E, the two narrow products 2 n p r (in + out). Backward: as much again for every router's weights, twice as
    much for the narrow products, and 2 n p r for the gradients of the gates. The gradients of the factors are sums.
    """
    rows, positions, wide, out = case.batch, case.positions, case.in_features, case.out_features
    factors, rank = SETTINGS.factors, RANK
    routers = 2 * (2 * rows * wide * factors) + 2 * rows * rank * wide * factors
    narrow = 2 * rows * positions * rank * (wide + out)
    gates = 2 * rows * positions * rank
    return 2 * rows * positions * wide + 2 * routers + 3 * narrow + gates


def excess(timings: dict[str, Timing]) -> float:
    """Return by how much MixLoRA takes longer than the frozen layer, as a fraction."""
    return timings["mixlora"].ratio - 1


def run(quick: bool, json_file: Path | None, threads: int, dtype: str, longest: float) -> int:
    """Run the benchmark; return its exit status."""
    torch.manual_seed(0)
    console, kind, seconds = open_console(), getattr(torch, dtype), min(longest, 3.0) if quick else longest
    outs, batches, lengths = ((4096,), (1,), (1, 128)) if quick else ((4096, 11008), (1, 4), (1, 128, 704))
    cases = [LinearCase(4096, out, batch, length) for out in outs for batch in batches for length in lengths]
    verdicts: list[Verdict] = []
    results: list[dict[str, Any]] = []
    about = {**prepare(threads, dtype, quick), "settings": SETTINGS.settings()}
    console.print(about)
    for case in cases:
        timings = one_linear(case, kind, seconds)
        console.print(ratio_table(f"forward + backward, {case}", timings))
        result: dict[str, Any] = {"case": case.__dict__, "times": timings, "excess": excess(timings)}
        if case.positions in JUDGED_POSITIONS:
            verdicts.append(Verdict(f"time, {case}", excess(timings), FORWARD_BACKWARD_LIMIT))
        counted, formula = flops(case, kind), expected_flops(case)
        off = abs(counted["mixlora"] - counted["frozen"] - formula)
        verdicts.append(Verdict(f"FLOPs off the formula, {case}", off, 0))
        results.append({**result, "flops": counted, "formula": formula})
    peaks = {}
    for case in (
        LinearCase(4096, out, batch, length) for out in outs for batch in batches for length in MEMORY_POSITIONS
    ):
        peaks[str(case)] = peak = peak_memory(case, kind)
        if case.positions == MEMORY_POSITIONS[-1]:
            verdicts.append(Verdict(f"peak memory beside PEFT's, {case}", peak["mixlora"] / peak["peft"], 1.0))
    prompt, steps = (16, 4) if quick else (lengths[-1], DECODE_STEPS)
    prefill, decode = decoding(prompt, steps, kind, seconds)
    console.print(ratio_table(f"block of seven linears, prefill of {prompt}", prefill))
    console.print(ratio_table(f"block of seven linears, {steps} decode steps", decode))
    verdicts.append(Verdict("decode step of a block", excess(decode), DECODE_LIMIT))
    step = adamw(4 if quick else 75)
    console.print(ratio_table("AdamW step, a block's adapters", step))
    console.print(_table("GFLOP of forward + backward", {_name(r): _scaled(r["flops"], 1e9) for r in results}))
    console.print(
        _table("peak MiB of forward + backward", {case: _scaled(peak, 2**20) for case, peak in peaks.items()})
    )
    console.print(table_of_verdicts(verdicts))
    passed = all(verdict.passed for verdict in verdicts)
    console.print("passed" if passed else "FAILED")
    if json_file is not None:
        rest = {
            "prefill": prefill,
            "decode": decode,
            "adamw": step,
            "peak bytes": peaks,
            "verdicts": verdicts,
            "passed": passed,
        }
        write_json(json_file, {"machine": about, "layers": results, **rest})
    return 0 if passed else 1


def _name(result: dict[str, Any]) -> str:
    return str(LinearCase(**result["case"]))


def _scaled(counts: dict[str, int], unit: float) -> dict[str, float]:
    return {name: count / unit for name, count in counts.items()}


def _table(title: str, rows: dict[str, dict[str, float]]) -> Table:
    names = list(next(iter(rows.values())))
    table = table_of(title, ("case", *names))
    for case, values in rows.items():
        table.add_row(case, *(f"{values[name]:.3f}" for name in names))
    return table
