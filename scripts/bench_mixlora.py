"""What MixLoRA costs beside the frozen linear, PEFT's LoRA of equal rank, and a plain dense-delta formulation.

    python scripts/bench_mixlora.py [--quick] [--json FILE] [--seconds S] [--threads N] [--dtype bfloat16]

Every layer runs in turns with the frozen linear (its input with a gradient) and with that frozen linear once more, the
control; what it takes is compared with the mean of these two in the same turn. Turns go on until the 95 % interval of
the median lies on one side of the limit, or the time for it is up. Weights are shared, random, of LLaVA-1.5-7B's sizes.
With one thread (the default) the clock is the processor time of this process, so that other processes count little;
with more it is the wall clock. Status 0 if

- forward + backward takes at most 5 % longer than the frozen linear, at 128 and 704 positions;
- a decode step of a block of seven linears at most 10 %;
- peak memory of forward + backward at 704 positions is at most PEFT's, gradients included;
- the floating-point operations are exactly what the formulas say.

One position is timed as well, and not judged: there is no training on sequences of one, and routing's fixed number of
small operations then stands against a matrix-vector product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_timing import (
    REFERENCE,
    Samples,
    Timing,
    excesses,
    fair_clock,
    interleave,
    machine,
    ratio_table,
    summarise,
    until_decided,
    with_reference,
    write_json,
)
from mixlora_variants import RANK, SETTINGS, Block, block, forward_backward, layers, peak_bytes, trained
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

FORWARD_BACKWARD_LIMIT, DECODE_LIMIT = 0.05, 0.10
JUDGED_POSITIONS = (128, 704)
# Both are shown, the longer is judged: for short ones the gradients of pools and routers weigh most.
MEMORY_POSITIONS = (128, 704)
DECODE_STEPS = 32
TURNS = 6  # taken at a time
FROZEN, CONTROL, DENSE = "frozen", "control", "dense delta"


@dataclass(frozen=True)
class Case:
    """One linear and one batch."""

    in_features: int
    out_features: int
    batch: int
    positions: int

    def __str__(self) -> str:
        return f"{self.in_features} x {self.out_features}, batch {self.batch}, {self.positions} positions"


@dataclass(frozen=True)
class Verdict:
    """One criterion: what was measured, what it may be at most, and whether it is."""

    what: str
    measured: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.measured <= self.limit


def one_linear(case: Case, dtype: torch.dtype, seconds: float) -> dict[str, Timing]:
    """Forward + backward of every variant; the dense one, which takes the longest, in a few turns of its own."""
    hidden = torch.randn(case.batch, case.positions, case.in_features, dtype=dtype).requires_grad_()
    gradient = torch.randn(case.batch, case.positions, case.out_features, dtype=dtype)
    made = layers(case.in_features, case.out_features, dtype)
    calls = {name: forward_backward(layer, hidden, gradient) for name, layer in made.items()}
    dense = {name: calls[name] for name in (FROZEN, CONTROL)} | {DENSE: calls.pop(DENSE)}
    limit = FORWARD_BACKWARD_LIMIT if case.positions in JUDGED_POSITIONS else None
    timings = _timings(calls, seconds, limit)
    beside = _summarised(interleave(dense, rounds=TURNS // 2, warmup=1, clock=fair_clock()))
    return {**timings, DENSE: beside[DENSE]}


def _timings(calls: dict[str, Callable[[], None]], seconds: float, limit: float | None) -> dict[str, Timing]:
    """Times the calls in turns until MixLoRA is decided by the limit, or `seconds` are over; beside the frozen ones.

    Args:
        limit: None: nothing is judged, and a quarter of the time does.
    """

    def judged(samples: Samples) -> dict[str, list[float]]:
        return {"mixlora": excesses(with_reference(samples, FROZEN, CONTROL), "mixlora")}

    seconds = seconds if limit is not None else seconds / 4
    return _summarised(until_decided(calls, judged, limit=limit, turns=TURNS, seconds=seconds, clock=fair_clock()))


def _summarised(samples: Samples) -> dict[str, Timing]:
    return summarise(with_reference(samples, FROZEN, CONTROL), baseline=REFERENCE)


def decoding(positions: int, dtype: torch.dtype, seconds: float) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """A block of seven linears: its prefill of `positions`, and 32 decode steps after it."""
    made: dict[str, Block] = block(dtype)
    width = made["frozen"].width
    prompt, token = torch.randn(1, positions, width, dtype=dtype), torch.randn(1, 1, width, dtype=dtype)

    @torch.no_grad()
    def prefill(block: Block) -> None:
        block.prefill(prompt)

    @torch.no_grad()
    def decode(block: Block) -> None:
        for _ in range(DECODE_STEPS):
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
    """An AdamW step of the adapters of a whole block, baseline PEFT's LoRA of equal rank."""
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


def peak_memory(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that forward + backward of each variant takes at most, gradients included, beside weights and input."""
    hidden = torch.randn(case.batch, case.positions, case.in_features, dtype=dtype).requires_grad_()
    gradient = torch.randn(case.batch, case.positions, case.out_features, dtype=dtype)
    made = layers(case.in_features, case.out_features, dtype)
    return {name: peak_bytes(forward_backward(layer, hidden, gradient)) for name, layer in made.items()}


def flops(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """Floating-point operations of forward + backward, as torch counts them."""
    hidden = torch.randn(case.batch, case.positions, case.in_features, dtype=dtype).requires_grad_()
    gradient = torch.randn(case.batch, case.positions, case.out_features, dtype=dtype)
    counted = {}
    for name, layer in layers(case.in_features, case.out_features, dtype).items():
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: _product}) as counter:
            forward_backward(layer, hidden, gradient)()
        counted[name] = int(counter.get_total_flops())
    return counted


def _product(_: torch.Size, a: torch.Size, b: torch.Size, **rest: Any) -> int:
    """Of a batched product that is added in place, which torch's counter does not know."""
    return 2 * a.numel() * b[-1]


def expected_flops(case: Case) -> int:
    """What MixLoRA adds to the frozen linear's forward + backward, by formula; torch counts matrix products only.

    n rows of p positions. Forward: the pooled mean 2 n p in, two routers 2 n in E each, the conditional one
    2 n r in E, the two narrow products 2 n p r (in + out). Backward: every router's weights as their forward, the
    narrow products twice theirs, and the pools' gradients 2 n r E (in + out).
    """
    rows, positions, wide, out = case.batch, case.positions, case.in_features, case.out_features
    factors, rank = SETTINGS.factors, RANK
    routers = 2 * (2 * rows * wide * factors) + 2 * rows * rank * wide * factors
    narrow = 2 * rows * positions * rank * (wide + out)
    pools = 2 * rows * rank * factors * (wide + out)
    return 2 * rows * positions * wide + 2 * routers + 3 * narrow + pools


def excess(timings: dict[str, Timing]) -> float:
    """How much longer than the frozen layer MixLoRA takes, as a fraction."""
    return timings["mixlora"].ratio - 1


def main(
    quick: Annotated[bool, typer.Option("--quick", help="One size, batch 1, short sequences, few turns.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured here.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch; with more than one, the wall clock counts.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of hidden states and frozen weights: float32 or bfloat16.")] = "float32",
    longest: Annotated[
        float, typer.Option("--seconds", min=1, help="Wall seconds that the turns of one case may take.")
    ] = 300.0,
) -> None:
    """Times MixLoRA, and judges it by the criteria above."""
    torch.manual_seed(0)
    console, kind, seconds = Console(), getattr(torch, dtype), min(longest, 5.0) if quick else longest
    outs, batches, lengths = ((4096,), (1,), (1, 128)) if quick else ((4096, 11008), (1, 4), (1, 128, 704))
    cases = [Case(4096, out, batch, length) for out in outs for batch in batches for length in lengths]
    verdicts, results = [], []
    torch.set_num_threads(threads)
    clock = "processor time" if threads == 1 else "wall clock"
    about = {**machine(), "clock": clock, "dtype": dtype, "quick": quick, "settings": SETTINGS.settings()}
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
    for case in (Case(4096, out, batch, length) for out in outs for batch in batches for length in MEMORY_POSITIONS):
        peaks[str(case)] = peak = peak_memory(case, kind)
        if case.positions == MEMORY_POSITIONS[-1]:
            verdicts.append(Verdict(f"peak memory beside PEFT's, {case}", peak["mixlora"] / peak["peft"], 1.0))
    prefill, decode = decoding(lengths[-1], kind, seconds)
    console.print(ratio_table(f"block of seven linears, prefill of {lengths[-1]}", prefill))
    console.print(ratio_table(f"block of seven linears, {DECODE_STEPS} decode steps", decode))
    verdicts.append(Verdict("decode step of a block", excess(decode), DECODE_LIMIT))
    step = adamw(4 if quick else 75)
    console.print(ratio_table("AdamW step, a block's adapters", step))
    console.print(_table("GFLOP of forward + backward", {_name(r): _scaled(r["flops"], 1e9) for r in results}))
    console.print(
        _table("peak MiB of forward + backward", {case: _scaled(peak, 2**20) for case, peak in peaks.items()})
    )
    console.print(_table_of_verdicts(verdicts))
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
    raise typer.Exit(0 if passed else 1)


def _name(result: dict[str, Any]) -> str:
    return str(Case(**result["case"]))


def _scaled(counts: dict[str, int], unit: float) -> dict[str, float]:
    return {name: count / unit for name, count in counts.items()}


def _table(title: str, rows: dict[str, dict[str, float]]) -> Table:
    table = Table(title=title, title_justify="left")
    names = list(next(iter(rows.values())))
    for heading in ("case", *names):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for case, values in rows.items():
        table.add_row(case, *(f"{values[name]:.3f}" for name in names))
    return table


def _table_of_verdicts(verdicts: list[Verdict]) -> Table:
    table = Table(title="criteria", title_justify="left")
    for heading in ("what", "measured", "at most", ""):
        table.add_column(heading)
    for verdict in verdicts:
        result = "passed" if verdict.passed else "FAILED"
        table.add_row(verdict.what, f"{verdict.measured:.4g}", f"{verdict.limit:g}", result)
    return table


if __name__ == "__main__":
    typer.run(main)
