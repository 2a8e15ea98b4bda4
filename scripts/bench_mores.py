"""What MoReS costs on top of the frozen model: time, FLOPs, memory. Real Llama layer shapes, random weights, no files.

    python scripts/bench_mores.py [--quick] [--json FILE] [--threads N] [--dtype bfloat16]

Every setting runs in turns with the frozen model (its inputs with a gradient, as a trained projector needs it) and with
the same frozen model once more, the control. What a setting takes is compared with the mean of these two in the same
turn; what lies between the two is what this machine cannot resolve. Turns go on until the 95 % interval of every median
lies on one side of the limit, or the time for it is up. Short sequences give more turns, and put more weight on what
MoReS costs in any pass. Status 0 if no setting takes more than 3 % longer in forward,
forward + backward or a decode step, and if FLOPs, parameters and buffers are exactly what the formulas say. With
--quick, which takes too few turns to tell 2 % from 4 %, only a setting whose whole interval is above the limit fails.

With one thread (the default) the clock is the processor time of this process, so that other processes count little;
with more it is the wall clock.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
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
    interval,
    machine,
    ratio_table,
    summarise,
    until_decided,
    with_reference,
    write_json,
)
from mores_variants import CONTROL, FROZEN, Case, expected, flops_of, size, squares_of, variants
from rich.console import Console

from llava_steering_plugin.modes.mores import MoReS

LIMIT = 0.03


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long: turns of each pass, and wall seconds after which no more are added."""

    cases: tuple[Case, ...]
    settings: tuple[MoReS, ...]
    turns: int
    seconds: float


SETTINGS = tuple(MoReS(rank=rank, tokens=tokens) for tokens in ("1%", "all") for rank in (1, 4))
FULL = Plan(
    (
        Case(1024, 2816, 16, layers=2, batch=1, visual=144, text=32),
        Case(4096, 11008, 32, layers=1, batch=1, visual=144, text=32),
    ),
    SETTINGS,
    turns=6,
    seconds=240,
)
QUICK = Plan(
    (
        Case(1024, 2816, 16, layers=1, batch=1, visual=144, text=32),
        Case(4096, 11008, 32, layers=1, batch=1, visual=24, text=8),
    ),
    (SETTINGS[0], SETTINGS[-1]),
    turns=4,
    seconds=6,
)


def timed(calls: dict[str, Callable[[], None]], plan: Plan) -> dict[str, list[float]]:
    """Takes turns until every adapter is decided, or the time is up."""

    def judged(samples: Samples) -> dict[str, list[float]]:
        beside = with_reference(samples, FROZEN, CONTROL)
        return {name: excesses(beside, name) for name in calls if name not in (FROZEN, CONTROL)}

    return until_decided(calls, judged, limit=LIMIT, turns=plan.turns, seconds=plan.seconds, clock=fair_clock())


def measured(case: Case, plan: Plan, dtype: torch.dtype, console: Console) -> dict[str, Any]:
    """Times and counts one case; everything that goes into the JSON."""
    console.rule(str(case), align="left")
    made = variants(case, plan.settings, dtype)
    passes: dict[str, dict[str, Any]] = {}
    for title, call in (("forward", "forward"), ("forward + backward", "forward_backward"), ("decode step", "decode")):
        turns = timed({name: getattr(variant, call) for name, variant in made.items()}, plan)
        samples = with_reference(turns, FROZEN, CONTROL)
        timings, against_frozen = (summarise(samples, baseline=name) for name in (REFERENCE, FROZEN))
        console.print(ratio_table(f"{title}, {len(samples[FROZEN])} turns", timings))
        passes[title] = {
            name: {
                **asdict(timing),
                "excess": timing.ratio - 1,
                "interval": interval(excesses(samples, name)),
                "over the control alone": against_frozen[name].ratio - against_frozen[CONTROL].ratio,
            }
            for name, timing in timings.items()
        }
    flops, squares = flops_of(made[FROZEN]), squares_of(made[FROZEN])
    sizes = {}
    for name, variant in made.items():
        if variant.mode is not None and variant.attachment is not None:
            got, formula = size(variant, variant.attachment, flops, squares), expected(case, variant.mode)
            sizes[name] = {"counted": asdict(got), "formula": asdict(formula), "equal": got == formula}
    return {"case": asdict(case), "times": passes, "sizes": sizes}


def failures(results: list[dict[str, Any]], quick: bool) -> list[str]:
    """One sentence for everything that is not as it must be."""
    found = []
    for result in results:
        width = result["case"]["width"]
        for title, of in result["times"].items():
            for name in result["sizes"]:
                excess, (lowest, _) = of[name]["excess"], of[name]["interval"]
                if (lowest if quick else excess) > LIMIT:
                    found.append(f"width {width}, {title}, {name}: {excess:.1%} over the frozen model")
        found += [
            f"width {width}, {name}: FLOPs, parameters or buffers are {counts['counted']}, not {counts['formula']}"
            for name, counts in result["sizes"].items()
            if not counts["equal"]
        ]
    return found


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Short sequences, few rounds, two settings.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured here.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch; with more than one, the wall clock counts.")] = 1,
    dtype: Annotated[str, typer.Option(help="Data type of the model: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Times MoReS against the frozen model, and counts what it adds."""
    torch.set_num_threads(threads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    plan = QUICK if quick else FULL
    clock = "processor time" if threads == 1 else "wall clock"
    about = {**machine(), "clock": clock, "dtype": dtype, "quick": quick, "limit": LIMIT}
    console.print(about)
    results = [measured(case, plan, getattr(torch, dtype), console) for case in plan.cases]
    found = failures(results, quick)
    for failure in found:
        console.print(failure)
    judged = "nothing is certainly more than" if quick else "everything is at most"
    console.print("FAILED" if found else f"passed: {judged} {LIMIT:.0%} over the frozen model, and counts are exact")
    if json_file is not None:
        write_json(json_file, {"machine": about, "results": results, "failures": found, "passed": not found})
    raise typer.Exit(1 if found else 0)


if __name__ == "__main__":
    typer.run(main)
