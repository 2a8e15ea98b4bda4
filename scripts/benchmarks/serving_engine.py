"""Measure MoReS in vLLM beside vLLM's base, PEFT's LoRAs in vLLM and our own worker, with 1, 8 and 32 requests at once.

All answer questions about one random LLaVA, exported for vLLM, in float32. One process has two engines of vLLM's: one
with 32 slots for MoReS alone, which are 32 adapters' of rank 4 that steer every visual token; and one with 8 slots of
rank 8 at all linears, for LoRAs of PEFT's. Our worker is another process, has the same 32 adapters and is asked by
HTTP. In every round each variant answers as many requests at once, in turns that are drawn anew; all others are idle
then. Every request has an image of its own, so that no cache knows it, and every answer the same number of tokens.
What is compared is the ratio of a round, of tokens of all answers a second.

The control is the engine for MoReS, with its base asked twice in every round: what its ratios differ from 1 is noise.
A target counts as met where its median misses it by no more than that.
"""

from __future__ import annotations

import base64
import io
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from PIL import Image
from rich.console import Console
from rich.table import Table

from .serving_engine_parts import LINEARS, LORAS, MOST, STEERING, Engines, make_all, running_engines, vllms_python
from .serving_requests import one_round, process_of, running
from .serving_targets import Target, noise_of, table_of_targets
from .shared.machine import open_console, prepare
from .shared.random_llava import WORDS, Shape
from .shared.verdicts import table_of, write_json

NO_VLLM = 2  # the exit status where there is none
LEAST = 0.95  # of the base's tokens a second, with MoReS
BATCH = 8  # answers of a batch in our worker, its default
BASE, CONTROL = "vLLM, base", "vLLM, base again"
AT_LINEARS = "vLLM with slots at all linears, base"
WORKER = "worker"
Rates = dict[str, list[float]]


@dataclass(frozen=True)
class Variant:
    """One way to answer.

    Attributes:
        home: an engine of vLLM's, or WORKER.
        adapters: that the requests are spread over; 0: the base answers.
        beside: the variant that it is compared with.
    """

    name: str
    home: str
    adapters: int
    beside: str


@dataclass(frozen=True)
class Workload:
    """One model, and what is asked of it.

    Attributes:
        least: number of rounds.
        seconds: after which no round begins once there have been `least`.
        tokens: of an answer.
        each: how often a variant is asked in a round, by the number of requests at once.
    """

    shape: Shape
    least: int
    seconds: float
    tokens: int
    each: Mapping[int, int]


LARGE = Shape("77 M parameters", 1024, 2816, 6, 16, 0, 128, 256, 2, 2, 112, 14)
SMALL = Shape("4 M parameters", 256, 704, 4, 4, 0, 128, 256, 2, 2, 112, 14)
FULL = Workload(LARGE, least=5, seconds=540, tokens=32, each={1: 2, 8: 1, 32: 1})
QUICK = Workload(SMALL, least=1, seconds=0, tokens=8, each={1: 1, 8: 1, 32: 1})


def variants(at_once: int) -> list[Variant]:
    """Return what answers a number of requests at once; the control is half a round from the base."""
    counts = [count for count in (1, 8, MOST) if count <= at_once]
    found = [Variant(BASE, STEERING, 0, BASE)]
    found += [Variant(f"vLLM, {count} of MoReS", STEERING, count, BASE) for count in counts]
    found.append(Variant(CONTROL, STEERING, 0, BASE))
    loras = min(at_once, LORAS)
    found.append(Variant(AT_LINEARS, LINEARS, 0, BASE))
    found.append(Variant(f"vLLM, {loras} of PEFT's LoRA", LINEARS, loras, AT_LINEARS))
    found.append(Variant(f"our worker, {at_once} of MoReS", WORKER, at_once, BASE))
    return found


class Answerers:
    """Both processes.

    Args:
        worker: its address.
    """

    def __init__(self, engines: Engines, worker: str):
        self._engines, self._worker, self._process = engines, worker, process_of(worker)
        listed = requests.post(f"{worker}/worker_get_status", timeout=5).json()["model_names"]
        self._names = listed[1:]  # the base comes first
        self._seeds = itertools.count()

    def rate(self, variant: Variant, at_once: int, texts: Sequence[str], tokens: int) -> float:
        """Return the tokens a second of requests about new images, so many at once until all texts are answered."""
        seeds = [next(self._seeds) for _ in texts]
        if variant.home == WORKER:
            bodies = [self._body(variant, *each, tokens) for each in zip(itertools.count(), texts, seeds)]
            return one_round(self._worker, at_once, bodies, self._process).rate
        seconds, answers = self._engines.ask(variant.home, self._groups(variant, at_once, texts, seeds), tokens)
        return tokens * len(answers) / seconds

    def check(self, tokens: int) -> None:
        """Answer the same questions with all variants of vLLM's: none with adapters may answer as the base."""
        texts, found = questions(8, 0), dict[str, list[list[int]]]()
        some = [variant for variant in variants(MOST) if variant.home != WORKER]
        for variant in some:
            groups = self._groups(variant, len(texts), texts, range(-len(texts), 0))
            found[variant.name] = self._engines.ask(variant.home, groups, tokens)[1]
        for variant in some:
            if variant.adapters and found[variant.name] == found[variant.beside]:
                raise SystemExit(f"{variant.name}: the answers are those of the base, so there is nothing to measure")

    @staticmethod
    def _groups(
        variant: Variant, at_once: int, texts: Sequence[str], seeds: Sequence[int]
    ) -> list[list[tuple[str, int, int | None]]]:
        prompts = [
            (text, seed, number % variant.adapters if variant.adapters else None)
            for number, (text, seed) in enumerate(zip(texts, seeds, strict=True))
        ]
        return [prompts[start : start + at_once] for start in range(0, len(prompts), at_once)]

    def _body(self, variant: Variant, number: int, text: str, seed: int, tokens: int) -> dict[str, Any]:
        return {
            "model": self._names[number % variant.adapters],
            "prompt": text,
            "images": [_picture(seed)],
            "temperature": 0.0,
            "max_new_tokens": tokens,
            "stop": "</s>",
        }


def _picture(seed: int) -> str:
    file = io.BytesIO()
    Image.frombytes("RGB", (112, 112), random.Random(seed).randbytes(3 * 112 * 112)).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def questions(count: int, seed: int) -> list[str]:
    """Return prompts about one image each."""
    chance = random.Random(seed)
    return [
        f"USER: <image>\n{' '.join(chance.choices(WORDS, k=chance.randint(5, 40)))} ASSISTANT:" for _ in range(count)
    ]


def measured(work: Workload, ask: Answerers, console: Console) -> dict[int, Rates]:
    """Return the tokens a second of every round, by the number of requests at once and the variant's name."""
    made = {at_once: variants(at_once) for at_once in work.each}
    ask.check(work.tokens)
    for at_once, some in made.items():
        for variant in some:
            if variant.home == WORKER or at_once < MOST or not variant.adapters:  # the warm-up
                ask.rate(variant, at_once, questions(at_once, 0), 2)
    rates: dict[int, Rates] = {at_once: {variant.name: [] for variant in some} for at_once, some in made.items()}
    begun, number, order = time.perf_counter(), 0, random.Random(0)
    while number < work.least or time.perf_counter() - begun < work.seconds:
        number += 1
        for at_once, some in made.items():
            texts = questions(at_once * work.each[at_once], number)
            for variant in order.sample(some, len(some)):
                rates[at_once][variant.name].append(ask.rate(variant, at_once, texts, work.tokens))
        console.print(f"round {number} of at least {work.least} has ended after {time.perf_counter() - begun:.0f} s")
    return rates


def ratios(rates: Mapping[int, Rates]) -> dict[int, Rates]:
    """Return the ratios of all rounds to what each variant is compared with."""
    return {
        at_once: {
            variant.name: [mine / other for mine, other in zip(of[variant.name], of[variant.beside], strict=True)]
            for variant in variants(at_once)
            if variant.name != variant.beside
        }
        for at_once, of in rates.items()
    }


def targets(found: Mapping[int, Rates]) -> list[Target]:
    """Judge the ratios of MoReS in vLLM."""
    return [
        Target(f"{at_once} at once, {variant.name}", LEAST, True, of[variant.name], noise_of(of[CONTROL]))
        for at_once, of in found.items()
        for variant in variants(at_once)
        if variant.home == STEERING and variant.adapters
    ]


def _table(rates: Mapping[int, Rates]) -> Table:
    columns = ("at once, variant", "tokens/s", "range", "ratio", "range", "to")
    table = table_of("tokens of all answers a second, medians of the rounds", columns)
    compared = ratios(rates)
    for at_once, of in rates.items():
        for variant in variants(at_once):
            mine = of[variant.name]
            cells = [f"{at_once:2}, {variant.name}", f"{statistics.median(mine):,.1f}", _range(mine, "{:,.1f}")]
            if variant.name in compared[at_once]:
                each = compared[at_once][variant.name]
                beside = "base" if variant.beside == BASE else "its base"
                cells += [f"{statistics.median(each):.3f}", _range(each, "{:.3f}"), beside]
            table.add_row(*cells)
        table.add_section()
    return table


def _range(values: Sequence[float], form: str) -> str:
    return f"{form.format(min(values))} .. {form.format(max(values))}"


def run(quick: bool, json_file: Path | None, threads: int) -> int:
    """Run the benchmark; return its exit status. A quick run is not judged: it has one round."""
    console = open_console()
    python = vllms_python()
    if not python.is_file():
        console.print(f"vLLM is needed, and there is no {python}: `scripts/setup.sh --vllm` makes it", soft_wrap=True)
        return NO_VLLM
    work = QUICK if quick else FULL
    about = {**prepare(threads, "float32", quick), "clock": "wall clock", "shape": work.shape.name}
    with tempfile.TemporaryDirectory(prefix="bench-engine-") as scratch:
        folder = Path(scratch)
        console.print("making a LLaVA and its adapters")
        made = make_all(work.shape, folder)
        console.print("starting vLLM's engines and our worker")
        with running_engines(python, made, threads, folder) as engines, running(folder, BATCH, threads) as worker:
            about |= engines.about
            console.print(about)
            rates = measured(work, Answerers(engines, worker), console)
    compared = ratios(rates)
    console.print(_table(rates))
    judged = [] if quick else targets(compared)
    if judged:
        console.print(table_of_targets(judged, "MoReS in vLLM, of vLLM's base: tokens a second"))
    passed = all(target.met for target in judged)
    if json_file is not None:
        results = {at_once: {"tokens a second": rates[at_once], "ratios": compared[at_once]} for at_once in rates}
        found = [{**vars(target), "verdict": target.verdict} for target in judged]
        write_json(json_file, {"machine": about, "results": results, "targets": found, "passed": passed})
    return 0 if passed else 1
