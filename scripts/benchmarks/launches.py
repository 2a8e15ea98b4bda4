"""Count the operations that an adapter adds to the frozen model, for each of its hosts.

A GPU at small batches pays for each operation that it launches, whatever its size. The counts are exact and depend on
no machine: a Llama of four layers, two rows, every linear a host of MixLoRA and of PEFT's LoRA. A host of MoReS is a
layer, one of MixLoRA a linear. What is done once in a pass is divided among the hosts too, so more layers cost less
each. A pool has no training; three adapters are in three rows of one batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from llava_steering_plugin.modes import registry
from llava_steering_plugin.modes.base import Mode

from .launches_variants import CASE, Counted, Phases, adapted, frozen, hosts_of, linears_of, pooled, with_lora
from .shared.frozen_llama import Case
from .shared.machine import open_console, prepare
from .shared.verdicts import table_of, write_json

DEFAULT = ("mores", "mixlora")
# Of the issue that asked for fewer: with these, launches are counted as they were then.
SETTINGS: Mapping[str, dict[str, int]] = {"mixlora": {"factors": 8, "rank": 2}}
LORA = "PEFT LoRA"
CHECKPOINTING: Mapping[str, bool | None] = {"": None, ", checkpointing": False, ", reentrant checkpointing": True}


def phases_of(counted: Counted, *, trained: bool) -> Phases:
    """Return the operations of every pass by its name."""
    found = counted.inference()
    if trained:
        for suffix, reentrant in CHECKPOINTING.items():
            found |= {f"{phase}{suffix}": count for phase, count in counted.training(reentrant).items()}
    return found


@functools.cache
def frozen_phases(case: Case, *, trained: bool) -> Phases:
    """Return the operations of the frozen model."""
    return phases_of(frozen(case), trained=trained)


def extra(counted: Counted, hosts: int, *, trained: bool) -> dict[str, float]:
    """Return the operations of every pass beyond those of the frozen model, for each host."""
    theirs = frozen_phases(counted.case, trained=trained)
    return {phase: (count - theirs[phase]) / hosts for phase, count in phases_of(counted, trained=trained).items()}


def counts_of(mode: Mode) -> dict[str, dict[str, float]]:
    """Return what a mode adds for each host: as one adapter, and in pools of one and of three."""
    hosts = len(hosts_of(mode))
    made: dict[str, Callable[[], Counted]] = {
        f"{mode.name}": lambda: adapted(mode),
        f"{mode.name}, pool of 1": lambda: pooled(mode, 1),
        f"{mode.name}, pool of 3": lambda: pooled(mode, 3),
    }
    found = {}
    for name, make in made.items():
        found[name] = extra(make(), hosts, trained=name == mode.name)
    return found


def run(modes: tuple[str, ...], json_file: Path | None) -> int:
    """Print the table; return the exit status, 0."""
    console = open_console(170)
    about = prepare(1, "float32", quick=False)
    plain = frozen_phases(CASE, trained=True)
    rows = {"frozen, a layer": {phase: count / CASE.layers for phase, count in plain.items()}}
    for name in modes or DEFAULT:
        rows |= counts_of(registry.configured(name, SETTINGS.get(name, {})))
    rows[LORA] = extra(with_lora(), linears_of(), trained=True)
    table = table_of("operations; of adapters: for each host, beyond the frozen model", ("pass", *rows))
    for phase in plain:
        table.add_row(phase, *(f"{row[phase]:.1f}" if phase in row else "-" for row in rows.values()))
    console.print(table)
    if json_file is not None:
        write_json(json_file, {"machine": about, "case": asdict(CASE), "rows": rows})
    return 0
