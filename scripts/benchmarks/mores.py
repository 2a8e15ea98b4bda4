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

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llava_steering_plugin.modes.mores import MoReS

from .mores_variants import expected, flops_of, size, squares_of, variants
from .shared.beside_frozen import FROZEN, LIMIT, Effort, conclude, timed, too_slow
from .shared.frozen_llama import Case
from .shared.machine import open_console, prepare


@dataclass(frozen=True)
class Workload:
    """Cases and settings, and how long each pass is timed."""

    cases: tuple[Case, ...]
    settings: tuple[MoReS, ...]
    effort: Effort


SETTINGS = tuple(MoReS(rank=rank, tokens=tokens) for tokens in ("1%", "all") for rank in (1, 4))
FULL = Workload(
    (
        Case(1024, 2816, 16, layers=2, batch=1, visual=144, text=32),
        Case(4096, 11008, 32, layers=1, batch=1, visual=144, text=32),
    ),
    SETTINGS,
    Effort(rounds=6, seconds=240),
)
QUICK = Workload(
    (
        Case(1024, 2816, 16, layers=1, batch=1, visual=144, text=32),
        Case(4096, 11008, 32, layers=1, batch=1, visual=24, text=8),
    ),
    (SETTINGS[0], SETTINGS[-1]),
    Effort(rounds=4, seconds=6),
)


def measured(case: Case, work: Workload, dtype: torch.dtype, console: Console) -> dict[str, Any]:
    """Time and count one case; return its part of the JSON."""
    console.rule(str(case), align="left")
    made = variants(case, work.settings, dtype)
    judged = [name for name, variant in made.items() if variant.mode is not None]
    passes = {}
    for title, call in (("forward", "forward"), ("forward + backward", "forward_backward"), ("decode step", "decode")):
        calls = {name: getattr(variant, call) for name, variant in made.items()}
        passes[title] = timed(title, calls, judged, work.effort, console)
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
        found += too_slow(f"width {width}", result["times"], result["sizes"], quick)
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
    return conclude(console, about, results, failures(results, quick), json_file, also=", and counts are exact")
