"""Measure what --steering_diagnostics_steps costs: a pass over its samples beside training steps, in one run.

A random LLaVA takes steps as upstream does, with gradient checkpointing and AdamW, and between them the passes that the
flag adds. With N = 100, one pass comes on 100 steps: its share of the time is pass / (100 * step). A pass has a forward
for each of its samples, whatever the batch, so small batches pay more. With one thread (the default) processor time is
measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_steering_plugin.adapters.attachment import required
from llava_steering_plugin.measures.modality import Kind
from llava_steering_plugin.training.beside import evaluating, random_states_kept
from llava_steering_plugin.training.diagnostics.measuring import Subject
from llava_steering_plugin.training.settings.diagnostics_flags import DEFAULT_SAMPLES

from .gpu_sizes import TINY, Size
from .gpu_steps import random_batch
from .gpu_variants import Variant, variants
from .shared.machine import open_console, prepare
from .shared.random_llava import build
from .shared.timing import fair_clock, interleave, summarise
from .shared.verdicts import Verdict, table_of, table_of_verdicts, write_json

EVERY, LIMIT = 100, 0.02
BATCHES = (1, 4)
NARROW = replace(
    TINY,
    name="narrow",
    width=512,
    inner=1408,
    heads=8,
    vocabulary=2000,
    side=336,
    text=128,
    tower_width=128,
    tower_inner=512,
)
PASS = "pass"
MEASURED = ("MoReS r=1, 1%", "MixLoRA E=16, r=4")


def run(quick: bool, json_file: Path | None, threads: int) -> int:
    """Run the measurement, print its tables, and return the exit status."""
    console, found_machine = open_console(160), prepare(threads, "float32", quick)
    size, rounds = (TINY, 2) if quick else (NARROW, 3)
    model = build(size, torch.device("cpu"), 16).float()
    table = table_of(
        f"a pass over {DEFAULT_SAMPLES} samples, every {EVERY} steps",
        ("", "batch", "step, s", "pass, s", "pass / step", "of the time"),
    )
    verdicts, rows = [], []
    for variant in variants(()):
        if variant.name not in MEASURED:
            continue
        samples = _samples(model, variant, size, rounds)
        timings = summarise(samples, baseline=PASS)
        for batch in BATCHES:
            step, one = timings[str(batch)], timings[PASS]
            ratio = 1 / step.ratio
            share = ratio / EVERY
            table.add_row(
                *(variant.name, str(batch), f"{step.seconds:.3f}", f"{one.seconds:.3f}"),
                *(f"{ratio:.2f}", f"{100 * share:.2f} %"),
            )
            rows.append({"variant": variant.name, "batch": batch, "step": step, "pass": one, "share": share})
            verdicts.append(Verdict(f"{variant.name}, batch {batch}: share of the time", share, LIMIT))
    console.print(table)
    console.print(table_of_verdicts(verdicts))
    passed = all(verdict.passed for verdict in verdicts)
    if json_file is not None:
        write_json(json_file, {"machine": found_machine, "rows": rows, "verdicts": verdicts, "passed": passed})
    return 0 if passed else 1


def _samples(model: Any, variant: Variant, size: Size, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of passes and of steps, by batch, in rounds."""
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with variant.on(model) as parameters:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        model.train()
        calls: dict[str, Callable[[], object]] = {PASS: _pass(model, size)}
        calls |= {str(batch): _step(model, replace(size, batch=batch), optimizer) for batch in BATCHES}
        return interleave(calls, rounds=rounds, warmup=1, clock=fair_clock())


def _step(model: Any, size: Size, optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    inputs = _inputs(size)

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _pass(model: Any, size: Size) -> Callable[[], object]:
    attachment = required(model)
    subject = Subject(model, [layer.path for layer in attachment.shape.layers], attachment.modules)
    inputs = _inputs(replace(size, batch=1))
    kinds = _kinds(size)

    def run_all() -> None:
        with random_states_kept(), torch.no_grad(), evaluating(model):
            rows = [subject.measure(lambda: model(**inputs), kinds) for _ in range(DEFAULT_SAMPLES)]
        found = subject.summary(torch.stack(rows)).record()
        assert found["lmar"]["answers"] == DEFAULT_SAMPLES

    return run_all


def _inputs(size: Size) -> dict[str, Tensor]:
    ids, images, labels = random_batch(size, torch.device("cpu"))
    return {"input_ids": ids, "images": images, "labels": labels, "attention_mask": torch.ones_like(ids)}


def _kinds(size: Size) -> Tensor:
    """Return what the positions of one sample of `random_batch` hold, int64 [1, positions]."""
    image = (size.side // size.patch) ** 2
    before, after = 4, size.text // 2 - 5
    counts = {Kind.FIRST: 1, Kind.PROMPT: before - 1, Kind.IMAGE: image}
    kinds = [int(kind) for kind, count in counts.items() for _ in range(count)]
    kinds += [int(Kind.PROMPT)] * after
    return torch.tensor([kinds + [int(Kind.ANSWER)] * (size.text + image - len(kinds))])
