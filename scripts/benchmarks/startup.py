"""Measure what starting a program costs, in processor time and as a multiple of what upstream's imports cost.

    python scripts/benchmarks startup [--rounds N] [--json FILE]

All programs run one after the other in every round, so that a busy machine slows all of them down alike: the ratios are
those of one round each, and the medians of these are compared.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .shared.machine import machine, open_console
from .shared.verdicts import Verdict, table_of, table_of_verdicts, write_json

PLAN_LIMIT = 1.2
HELP_SECONDS = 1.0

# What is left of the imports of a training when bitsandbytes does not set torch's compiler up.
WITHOUT_COMPILER = """
import torch
compile = torch.compile
torch.compile = lambda function=None, **options: function or (lambda function: function)
import bitsandbytes
torch.compile = compile
import llava.train.train
"""
REFERENCE, AS_IT_IS, PLAN = "import llava.train.train, no compiler", "import llava.train.train", "llava-steering plan"
COMMANDS = (
    *("", "chat", "check-data", "compare", "components", "convert", "doctor", "eval", "export", "patch", "plan"),
    *("prepare", "report", "score", "serve", "unpatch"),
)
MODULES = ("launch", "serving.page", "serving.worker")

LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


@dataclass(frozen=True)
class Start:
    """What one start took, in seconds."""

    processor: float
    wall: float


def programs(folder: Path) -> dict[str, list[str]]:
    """Return the arguments of Python for every program; the base that is planned for is written into `folder`."""
    (folder / "config.json").write_text(json.dumps(LLAMA_7B), encoding="utf-8")
    plan = ["plan", "--model_name_or_path", str(folder), "--tuning_mode", "mores", "--bf16", "True"]
    found = {
        REFERENCE: ["-c", WITHOUT_COMPILER],
        AS_IT_IS: ["-c", "import llava.train.train"],
        PLAN: ["-m", "llava_steering_plugin", *plan, "--gradient_checkpointing", "True"],
    }
    for command in COMMANDS:
        name = " ".join(filter(None, ("llava-steering", command, "--help")))
        found[name] = ["-m", "llava_steering_plugin", *filter(None, (command,)), "--help"]
    for module in MODULES:
        found[f"{module} --help"] = ["-m", f"llava_steering_plugin.{module}", "--help"]
    return found


def started(arguments: Sequence[str]) -> Start:
    """Run Python with these arguments to its end."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], text=True, capture_output=True)
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return Start(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall)


def measured(rounds: int) -> dict[str, list[Start]]:
    """Start every program once a round, after a round that is thrown away: it writes bytecode and fills caches."""
    with tempfile.TemporaryDirectory() as folder:
        found = programs(Path(folder))
        for arguments in found.values():
            started(arguments)
        starts: dict[str, list[Start]] = {name: [] for name in found}
        for _ in range(rounds):
            for name, arguments in found.items():
                starts[name].append(started(arguments))
    return starts


def ratio(starts: Mapping[str, Sequence[Start]], name: str) -> float:
    """Return the median, over the rounds, of a program's processor time in units of the reference's."""
    return statistics.median(
        one.processor / other.processor for one, other in zip(starts[name], starts[REFERENCE], strict=True)
    )


def judged(starts: Mapping[str, Sequence[Start]]) -> Iterator[Verdict]:
    yield Verdict(f"{PLAN}, in units of the reference", ratio(starts, PLAN), PLAN_LIMIT)
    for name, several in starts.items():
        if name.endswith("--help"):
            yield Verdict(f"{name}, wall-clock seconds at best", min(start.wall for start in several), HELP_SECONDS)


def run(rounds: int, json_file: Path | None) -> int:
    """Measure, print both tables, and return the exit status."""
    conditions = machine()
    starts = measured(rounds)
    table = table_of(
        f"starting a program, medians of {rounds} rounds", ("program", "processor s", "wall s", "of the reference")
    )
    for name, several in starts.items():
        processor, wall = (statistics.median(getattr(s, clock) for s in several) for clock in ("processor", "wall"))
        table.add_row(name, f"{processor:.2f}", f"{wall:.2f}", f"{ratio(starts, name):.2f}")
    verdicts = list(judged(starts))
    console = open_console()
    console.print(table)
    console.print(table_of_verdicts(verdicts))
    if json_file is not None:
        write_json(json_file, {"machine": conditions, "starts": starts, "verdicts": verdicts})
    return 0 if all(verdict.passed for verdict in verdicts) else 1
