"""Measure the time, FLOPs and memory that MoReS adds to the frozen model, on real Llama layer shapes.

The weights are random; no files are read. Every setting runs in rounds with the frozen model (its inputs have a
gradient, as a trained projector needs it) and with the same frozen model a second time, the control. A setting is
compared with the mean of these two in the same round; the difference between the two is the resolution of this machine.
Rounds go on until the 95 % interval of every median lies on one side of the limit, or the time is up. Short sequences
allow more rounds, and give more weight to the fixed cost of MoReS per pass.

With --quick there are too few rounds to tell 2 % from 4 %, so only a setting whose whole interval is above the limit
fails. With one thread (the default) processor time is measured, so that other processes count little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llava_steering_plugin.modes.mores import MoReS

from .mores_variants import CONTROL, FROZEN, expected, flops_of, size, squares_of, variants
from .shared.frozen_llama import Case
from .shared.machine import open_console, prepare
from .shared.timing import (
    REFERENCE,
    Samples,
    excesses,
    fair_clock,
    figures,
    ratio_table,
    summarise,
    until_decided,
    with_reference,
)
from .shared.verdicts import write_json

LIMIT = 0.03


@dataclass(frozen=True)
class Workload:
    """Cases and settings, rounds of each pass, and the wall-clock seconds after which no rounds are added."""

    cases: tuple[Case, ...]
    settings: tuple[MoReS, ...]
    rounds: int
    seconds: float


SETTINGS = tuple(MoReS(rank=rank, tokens=tokens) for tokens in ("1%", "all") for rank in (1, 4))
FULL = Workload(
    (
        Case(1024, 2816, 16, layers=2, batch=1, visual=144, text=32),
        Case(4096, 11008, 32, layers=1, batch=1, visual=144, text=32),
    ),
    SETTINGS,
    rounds=6,
    seconds=240,
)
QUICK = Workload(
    (
        Case(1024, 2816, 16, layers=1, batch=1, visual=144, text=32),
        Case(4096, 11008, 32, layers=1, batch=1, visual=24, text=8),
    ),
    (SETTINGS[0], SETTINGS[-1]),
    rounds=4,
    seconds=6,
)


def timed(calls: dict[str, Callable[[], None]], work: Workload) -> dict[str, list[float]]:
    """Run rounds until every adapter is decided, or the time is up."""

    def judged(samples: Samples) -> dict[str, list[float]]:
        beside = with_reference(samples, FROZEN, CONTROL)
        return {name: excesses(beside, name) for name in calls if name not in (FROZEN, CONTROL)}

    return until_decided(calls, judged, limit=LIMIT, rounds=work.rounds, seconds=work.seconds, clock=fair_clock())


def measured(case: Case, work: Workload, dtype: torch.dtype, console: Console) -> dict[str, Any]:
    """Time and count one case; return its part of the JSON."""
    console.rule(str(case), align="left")
    made = variants(case, work.settings, dtype)
    passes: dict[str, dict[str, Any]] = {}
    for title, call in (("forward", "forward"), ("forward + backward", "forward_backward"), ("decode step", "decode")):
        raw = timed({name: getattr(variant, call) for name, variant in made.items()}, work)
        samples = with_reference(raw, FROZEN, CONTROL)
        timings, against_frozen = (summarise(samples, baseline=name) for name in (REFERENCE, FROZEN))
        console.print(ratio_table(f"{title}, {len(samples[FROZEN])} rounds", timings))
        passes[title] = {
            name: {
                **figures(samples, timing),
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
    """Return one sentence for each criterion that is not met."""
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


def run(quick: bool, json_file: Path | None, threads: int, dtype: str) -> int:
    """Run the benchmark; return its exit status."""
    console = open_console()
    work = QUICK if quick else FULL
    about = {**prepare(threads, dtype, quick), "limit": LIMIT}
    console.print(about)
    results = [measured(case, work, getattr(torch, dtype), console) for case in work.cases]
    found = failures(results, quick)
    for failure in found:
        console.print(failure)
    judged = "nothing is certainly more than" if quick else "everything is at most"
    console.print("FAILED" if found else f"passed: {judged} {LIMIT:.0%} over the frozen model, and counts are exact")
    if json_file is not None:
        write_json(json_file, {"machine": about, "results": results, "failures": found, "passed": not found})
    return 1 if found else 0
