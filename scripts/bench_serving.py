"""What it costs to serve many adapters on one model: memory, choosing one, prefill and decode.

    python scripts/bench_serving.py [--quick] [--json FILE] [--threads N] [--dtype bfloat16]

Real Llama layer shapes with random weights. 1, 10, 100 and 1,000 adapters of MoReS and of MixLoRA, and up to 100 of
PEFT's LoRA (unmerged, `set_adapter` before each generation), wait in one model each; all models share their weights.
They generate in turns with the plain base and with that base once more, the control, through transformers' own
`generate`, another adapter in every turn. Prefill and decode steps are told apart by when each pass ends. What a
variant takes is compared with the mean of the base and the control in the same turn. Last, eight prompts with eight
adapters are answered one after the other, and as one batch in which each row has its own.

The control's spread is the third quartile of what it differs from the base, turn by turn. Status 0 if no decode step
with MoReS takes longer than the base by more than that spread, and choosing one of a pool's adapters takes less than a
millisecond. With --quick, which takes few turns, decode fails only if its whole interval is above the spread.

With one thread (the default) the clock is the processor time of this process, so that other processes count little;
with more it is the wall clock. Choosing is always timed by the wall clock.
"""

from __future__ import annotations

import functools
import gc
import logging
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_timing import (
    REFERENCE,
    Samples,
    excesses,
    fair_clock,
    interleave,
    interval,
    machine,
    ratio_table,
    summarise,
    with_reference,
    write_json,
)
from mores_variants import Case
from rich.console import Console
from rich.table import Table
from serving_variants import BASE, CONTROL, PEFT, Variant, variants

SWITCH_LIMIT = 1e-3
PREFILL, DECODE, SPREAD = "prefill", "decode step", "spread of the control"


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long.

    Attributes:
        cases: models, each with how many adapters at once, by kind.
        turns: fewest turns of each case.
        seconds: wall seconds after which no turn begins, the fewest excepted.
        steps: decode steps of a generation.
        switches: how often choosing is timed.
        batches: turns of the batches.
    """

    cases: tuple[tuple[Case, dict[str, tuple[int, ...]]], ...]
    turns: int
    seconds: float
    steps: int
    switches: int
    batches: int


COUNTS = (1, 10, 100, 1000)
# The second model's layers take next to nothing, so that what Python does around them shows.
FULL = Plan(
    (
        (
            Case(1024, 2816, 16, layers=2, batch=1, visual=576, text=64),
            # PEFT takes longer to add an adapter the more there are: a thousand would take most of the time.
            {"MoReS": COUNTS, "MixLoRA": COUNTS, PEFT: COUNTS[:3]},
        ),
        (Case(64, 128, 4, layers=32, batch=1, visual=24, text=8), {"MoReS": COUNTS}),
    ),
    turns=9,
    seconds=100,
    steps=16,
    switches=200,
    batches=7,
)
# What is answered one by one and as a batch.
ROWS = 8
BATCHED = Case(512, 1408, 8, layers=4, batch=1, visual=64, text=16)
QUICK = Plan(
    (
        (
            Case(256, 704, 4, layers=2, batch=1, visual=64, text=16),
            {"MoReS": (1, 100), "MixLoRA": (1, 10), PEFT: (1, 10)},
        ),
    ),
    turns=4,
    seconds=4,
    steps=8,
    switches=50,
    batches=2,
)


def timed(made: Mapping[str, Variant], plan: Plan) -> dict[str, dict[str, list[float]]]:
    """Seconds of prefill and decode by variant, from generations in turns."""
    clock = fair_clock()
    names, order = list(made), random.Random(0)
    samples: dict[str, dict[str, list[float]]] = {title: {name: [] for name in names} for title in (PREFILL, DECODE)}
    for variant in made.values():
        variant.generate(2, clock)
    start, turn = time.perf_counter(), 0
    while turn < plan.turns or time.perf_counter() - start < plan.seconds:
        gc.collect()
        gc.disable()  # a collection would fall into whichever variant runs just then
        # Not a rotation: whoever always follows the same variant always finds what that one left in the caches.
        for name in order.sample(names, len(names)):
            prefill, decode = made[name].generate(plan.steps, clock)
            samples[PREFILL][name].append(prefill)
            samples[DECODE][name].append(decode)
        gc.enable()
        turn += 1
    return samples


def spread(samples: Samples) -> float:
    """The third quartile of what the control differs from the base, turn by turn: what cannot be resolved."""
    differences = [abs(mine / base - 1) for mine, base in zip(samples[CONTROL], samples[BASE], strict=True)]
    return statistics.quantiles(differences, n=4, method="inclusive")[2]


def measured(
    case: Case, kinds: dict[str, tuple[int, ...]], plan: Plan, dtype: torch.dtype, console: Console
) -> dict[str, Any]:
    """Everything about one case that goes into the JSON."""
    console.rule(str(case), align="left")
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as scratch:
        made = variants(case, kinds, dtype, Path(scratch))
    passes = {}
    for title, raw in timed(made, plan).items():
        samples = with_reference(raw, BASE, CONTROL)
        timings = summarise(samples, baseline=REFERENCE)
        console.print(ratio_table(f"{title}, {len(samples[BASE])} turns", timings))
        passes[title] = {
            SPREAD: spread(samples),
            "variants": {
                name: {**asdict(timing), "excess": timing.ratio - 1, "interval": interval(excesses(samples, name))}
                for name, timing in timings.items()
            },
        }
        console.print(f"the control's spread: {spread(samples):.1%}")
    kept = {}
    for name, variant in made.items():
        if variant.memory is not None:
            for _ in range(3):
                variant.switch()
            times = sorted(variant.switch() for _ in range(plan.switches))
            kept[name] = {
                "count": variant.count,
                "bytes each": variant.memory.tensors,
                "process bytes each": variant.memory.process,
                "switch seconds": statistics.median(times),
                "switch seconds, 95th percentile": times[int(0.95 * len(times))],
            }
    console.print(_kept_table(kept))
    return {"case": asdict(case), "passes": passes, "adapters": kept}


def _kept_table(kept: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(title="memory and choosing", title_justify="left")
    for heading in ("variant", "KB each", "process grew, KB each", "choosing, us", "95th percentile"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for name, of in kept.items():
        table.add_row(
            name,
            f"{of['bytes each'] / 1e3:,.1f}",
            f"{of['process bytes each'] / 1e3:,.1f}",
            f"{1e6 * of['switch seconds']:,.0f}",
            f"{1e6 * of['switch seconds, 95th percentile']:,.0f}",
        )
    return table


def batched(plan: Plan, dtype: torch.dtype, console: Console) -> dict[str, Any]:
    """Prompts with different adapters, one after the other and at once."""
    console.rule(f"{ROWS} prompts with {ROWS} adapters: {BATCHED}", align="left")
    clock = fair_clock()
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as scratch:
        made = variants(BATCHED, {"MoReS": (ROWS,), "MixLoRA": (ROWS,)}, dtype, Path(scratch))
    made.pop(CONTROL)
    calls: dict[str, Callable[[], object]] = {}
    for name, variant in made.items():
        one: Callable[[], object] = functools.partial(_one_by_one, variant, plan.steps, clock)
        calls |= {
            f"{name}: one by one": one,
            f"{name}: one batch": functools.partial(variant.generate_together, ROWS, plan.steps, clock),
        }
    samples = interleave(calls, rounds=plan.batches, warmup=1, clock=clock)
    timings = summarise(samples, baseline=f"{BASE}: one by one")
    console.print(ratio_table(f"{ROWS} x ({BATCHED.positions} + {plan.steps} tokens), {plan.batches} turns", timings))
    return {"case": asdict(BATCHED), "rows": ROWS, "variants": {name: asdict(of) for name, of in timings.items()}}


def _one_by_one(variant: Variant, steps: int, clock: Callable[[], float]) -> None:
    for _ in range(ROWS):
        variant.generate(steps, clock)


def failures(results: list[dict[str, Any]], quick: bool) -> list[str]:
    """One sentence for everything that is not as it must be."""
    found = []
    for result in results:
        width, decode = result["case"]["width"], result["passes"][DECODE]
        for name, timing in decode["variants"].items():
            excess = timing["interval"][0] if quick else timing["excess"]
            if name.startswith("MoReS") and excess > decode[SPREAD]:
                found.append(
                    f"width {width}, {name}: a decode step takes {excess:.1%} longer than the base, and the control's "
                    f"spread is {decode[SPREAD]:.1%}"
                )
        found += [
            f"width {width}, {name}: choosing takes {1e3 * kept['switch seconds']:.2f} ms"
            for name, kept in result["adapters"].items()
            if not name.startswith(PEFT) and kept["switch seconds"] >= SWITCH_LIMIT
        ]
    return found


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A small model, few turns, up to 100 adapters.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured here.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch; with more than one, the wall clock counts.")] = 1,
    dtype: Annotated[str, typer.Option(help="Data type of the model: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Times generations with one of many resident adapters against the plain base."""
    torch.set_num_threads(threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    console = Console(width=None if sys.stdout.isatty() else 120)
    plan = QUICK if quick else FULL
    clock = "processor time" if threads == 1 else "wall clock"
    about = {**machine(), "clock": clock, "dtype": dtype, "quick": quick}
    console.print(about)
    results = [measured(*case, plan, getattr(torch, dtype), console) for case in plan.cases]
    together = batched(plan, getattr(torch, dtype), console)
    found = failures(results, quick)
    for failure in found:
        console.print(failure)
    judged = "certainly " if quick else ""
    good = f"no decode step with MoReS is {judged}slower than the base by the control's spread, choosing takes < 1 ms"
    console.print("FAILED" if found else f"passed: {good}")
    if json_file is not None:
        write_json(
            json_file,
            {"machine": about, "results": results, "batches": together, "failures": found, "passed": not found},
        )
    raise typer.Exit(1 if found else 0)


if __name__ == "__main__":
    typer.run(main)
