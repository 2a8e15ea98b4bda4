"""Measure the cost of many adapters on one model: memory, selection, prefill and decode steps.

The layers have real Llama shapes and random weights. 1, 10, 100 and 1,000 adapters of MoReS and of MixLoRA, and up to
100 of PEFT's LoRA (unmerged, `set_adapter` before each generation), are resident in one model each; all models share
their weights. They generate in rounds with the plain base and with that base a second time, the control, through
transformers' own `generate`, with another adapter in every round. The end of each pass separates prefill and decode
steps. A variant is compared with the mean of base and control in the same round. Last, eight prompts with eight
adapters are answered one after the other, and in one batch whose rows have an adapter each.

The control's spread is the third quartile of its differences from the base, round by round. With one thread (the
default) processor time is measured, so that other processes count little. Selection always counts wall-clock time.
"""

from __future__ import annotations

import functools
import gc
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .serving_variants import BASE, CONTROL, PEFT, Variant, variants
from .shared.frozen_llama import Case
from .shared.machine import open_console, prepare
from .shared.timing import (
    REFERENCE,
    Samples,
    fair_clock,
    figures,
    interleave,
    ratio_table,
    summarise,
    with_reference,
)
from .shared.verdicts import table_of, write_json

SWITCH_LIMIT = 1e-3
PREFILL, DECODE, SPREAD = "prefill", "decode step", "spread of the control"


@dataclass(frozen=True)
class Workload:
    """The models of a run, and the number of measurements.

    Attributes:
        cases: models, each with the numbers of adapters, by kind.
        rounds: smallest number of rounds of each case.
        seconds: wall-clock seconds after which no round begins, once `rounds` are done.
        steps: decode steps of a generation.
        switches: number of selections that are timed.
        batches: rounds of the batches.
    """

    cases: tuple[tuple[Case, dict[str, tuple[int, ...]]], ...]
    rounds: int
    seconds: float
    steps: int
    switches: int
    batches: int


COUNTS = (1, 10, 100, 1000)
# The second model's layers are tiny, so that the cost of Python around them shows.
FULL = Workload(
    (
        (
            Case(1024, 2816, 16, layers=2, batch=1, visual=576, text=64),
            # PEFT adds an adapter more slowly the more there are: a thousand would take most of the time.
            {"MoReS": COUNTS, "MixLoRA": COUNTS, PEFT: COUNTS[:3]},
        ),
        (Case(64, 128, 4, layers=32, batch=1, visual=24, text=8), {"MoReS": COUNTS}),
    ),
    rounds=9,
    seconds=100,
    steps=16,
    switches=200,
    batches=7,
)
# Prompts that are answered one by one and in one batch.
ROWS = 8
BATCHED = Case(512, 1408, 8, layers=4, batch=1, visual=64, text=16)
QUICK = Workload(
    (
        (
            Case(256, 704, 4, layers=2, batch=1, visual=64, text=16),
            {"MoReS": (1, 100), "MixLoRA": (1, 10), PEFT: (1, 10)},
        ),
    ),
    rounds=4,
    seconds=4,
    steps=8,
    switches=50,
    batches=2,
)


def timed(made: Mapping[str, Variant], work: Workload) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of prefill and decode step by variant, from generations in rounds."""
    clock = fair_clock()
    names, order = list(made), random.Random(0)
    samples: dict[str, dict[str, list[float]]] = {title: {name: [] for name in names} for title in (PREFILL, DECODE)}
    for variant in made.values():
        variant.generate(2, clock)
    start, done = time.perf_counter(), 0
    while done < work.rounds or time.perf_counter() - start < work.seconds:
        gc.collect()
        gc.disable()  # a collection would count for the variant that happens to run
        # No rotation: a variant that always follows the same one would always find the same caches.
        for name in order.sample(names, len(names)):
            prefill, decode = made[name].generate(work.steps, clock)
            samples[PREFILL][name].append(prefill)
            samples[DECODE][name].append(decode)
        gc.enable()
        done += 1
    return samples


def spread(samples: Samples) -> float:
    """Return the third quartile of the control's differences from the base, round by round."""
    differences = [abs(mine / base - 1) for mine, base in zip(samples[CONTROL], samples[BASE], strict=True)]
    return statistics.quantiles(differences, n=4, method="inclusive")[2]


def measured(
    case: Case, kinds: dict[str, tuple[int, ...]], work: Workload, dtype: torch.dtype, console: Console
) -> dict[str, Any]:
    """Measure one case; return its part of the JSON."""
    console.rule(str(case), align="left")
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as scratch:
        made = variants(case, kinds, dtype, Path(scratch))
    passes = {}
    for title, raw in timed(made, work).items():
        samples = with_reference(raw, BASE, CONTROL)
        timings = summarise(samples, baseline=REFERENCE)
        console.print(ratio_table(f"{title}, {len(samples[BASE])} rounds", timings))
        passes[title] = {
            SPREAD: spread(samples),
            "variants": {name: figures(samples, timing) for name, timing in timings.items()},
        }
        console.print(f"the control's spread: {spread(samples):.1%}")
    kept = {}
    for name, variant in made.items():
        if variant.memory is not None:
            for _ in range(3):
                variant.switch()
            times = sorted(variant.switch() for _ in range(work.switches))
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
    columns = ("variant", "KB each", "process grew, KB each", "selection, us", "95th percentile")
    table = table_of("memory and selection", columns)
    for name, of in kept.items():
        table.add_row(
            name,
            f"{of['bytes each'] / 1e3:,.1f}",
            f"{of['process bytes each'] / 1e3:,.1f}",
            f"{1e6 * of['switch seconds']:,.0f}",
            f"{1e6 * of['switch seconds, 95th percentile']:,.0f}",
        )
    return table


def batched(work: Workload, dtype: torch.dtype, console: Console) -> dict[str, Any]:
    """Time prompts with different adapters, one after the other and in one batch."""
    console.rule(f"{ROWS} prompts with {ROWS} adapters: {BATCHED}", align="left")
    clock = fair_clock()
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as scratch:
        made = variants(BATCHED, {"MoReS": (ROWS,), "MixLoRA": (ROWS,)}, dtype, Path(scratch))
    made.pop(CONTROL)
    calls: dict[str, Callable[[], object]] = {}
    for name, variant in made.items():
        one: Callable[[], object] = functools.partial(_one_by_one, variant, work.steps, clock)
        calls |= {
            f"{name}: one by one": one,
            f"{name}: one batch": functools.partial(variant.generate_together, ROWS, work.steps, clock),
        }
    samples = interleave(calls, rounds=work.batches, warmup=1, clock=clock)
    timings = summarise(samples, baseline=f"{BASE}: one by one")
    console.print(ratio_table(f"{ROWS} x ({BATCHED.positions} + {work.steps} tokens), {work.batches} rounds", timings))
    return {"case": asdict(BATCHED), "rows": ROWS, "variants": {name: asdict(of) for name, of in timings.items()}}


def _one_by_one(variant: Variant, steps: int, clock: Callable[[], float]) -> None:
    for _ in range(ROWS):
        variant.generate(steps, clock)


def failures(results: list[dict[str, Any]], quick: bool) -> list[str]:
    """Return one sentence for each criterion that is not met."""
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
            f"width {width}, {name}: selection takes {1e3 * kept['switch seconds']:.2f} ms"
            for name, kept in result["adapters"].items()
            if not name.startswith(PEFT) and kept["switch seconds"] >= SWITCH_LIMIT
        ]
    return found


def run(quick: bool, json_file: Path | None, threads: int, dtype: str) -> int:
    """Run the benchmark; return its exit status."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    console = open_console()
    work = QUICK if quick else FULL
    about = prepare(threads, dtype, quick)
    console.print(about)
    results = [measured(*case, work, getattr(torch, dtype), console) for case in work.cases]
    together = batched(work, getattr(torch, dtype), console)
    found = failures(results, quick)
    for failure in found:
        console.print(failure)
    judged = "certainly " if quick else ""
    good = f"no decode step with MoReS is {judged}slower than the base by the control's spread, selection takes < 1 ms"
    console.print("FAILED" if found else f"passed: {good}")
    if json_file is not None:
        write_json(
            json_file,
            {"machine": about, "results": results, "batches": together, "failures": found, "passed": not found},
        )
    return 1 if found else 0
