"""Measure what MoReS costs on transformers' own Llava, beside the frozen model and PEFT's LoRA, on real layer shapes.

The weights are random; no files are read. All variants run in rounds with the frozen model and with the same again, the
control, as the benchmark `mores` does it. LoRA is shown, and not judged.

A training step is forward, backward and AdamW, fused as in transformers' Trainer. The frozen model has nothing to
train, so its step is forward and backward: what an adapter's optimizer takes is part of what it costs. A decode step is
one forward over the cache of a prefill, in the scope that `generate` opens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llava_steering_plugin.modes.mores import MoReS

from .shared.beside_frozen import LIMIT, Effort, conclude, timed, too_slow
from .shared.frozen_llama import Case
from .shared.machine import keep_freed_memory, open_console, prepare

NEEDED = 5
NO_MODEL = 2  # the exit status where transformers is too old


@dataclass(frozen=True)
class Workload:
    """Cases, and how long each pass is timed."""

    cases: tuple[Case, ...]
    effort: Effort


SETTINGS = (MoReS(rank=1, tokens="1%"), MoReS(rank=4, tokens="all"))
FULL = Workload(
    (
        Case(1024, 2816, 16, layers=2, batch=1, visual=144, text=32),
        # Short: many rounds fit, and the work of each pass that does not grow with the tokens weighs more.
        Case(4096, 11008, 32, layers=1, batch=1, visual=16, text=8),
    ),
    Effort(rounds=4, seconds=300),
)
QUICK = Workload((Case(512, 1408, 8, layers=1, batch=1, visual=36, text=12),), Effort(rounds=4, seconds=3))


def measured(case: Case, effort: Effort, dtype: torch.dtype, console: Console) -> dict[str, Any]:
    """Time one case; return its part of the JSON."""
    from .own_classes_variants import variants

    console.rule(str(case), align="left")
    made = variants(case, SETTINGS, dtype)
    judged = [name for name in made if name.startswith("MoReS")]
    passes = {
        title: timed(title, {name: getattr(variant, call) for name, variant in made.items()}, judged, effort, console)
        for title, call in (("training step", "train"), ("decode step", "decode"))
    }
    return {"case": asdict(case), "times": passes, "judged": judged}


def failures(results: list[dict[str, Any]], quick: bool) -> list[str]:
    """Return one sentence for each criterion that is not met."""
    return [
        failure
        for result in results
        for failure in too_slow(f"width {result['case']['width']}", result["times"], result["judged"], quick)
    ]


def run(quick: bool, json_file: Path | None, threads: int, dtype: str) -> int:
    """Run the benchmark; return its exit status."""
    console = open_console()
    installed = version("transformers")
    if int(installed.partition(".")[0]) < NEEDED:
        console.print(
            f"transformers {installed} is too old for its own Llava to carry an adapter; {NEEDED} or newer is needed. "
            "`scripts/setup.sh --transformers` makes an environment with it; then run "
            "`.venv-transformers/bin/python scripts/benchmarks transformers`.",
            soft_wrap=True,
        )
        return NO_MODEL
    work = QUICK if quick else FULL
    keep_freed_memory()
    about = {**prepare(threads, dtype, quick), "transformers": installed, "peft": version("peft"), "limit": LIMIT}
    console.print(about)
    results = [measured(case, work.effort, getattr(torch, dtype), console) for case in work.cases]
    return conclude(console, about, results, failures(results, quick), json_file)
