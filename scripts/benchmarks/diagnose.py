"""Measure what `llava-steering diagnose modality` costs beside the same plain generation.

A LLaVA with random weights answers the same batch of questions with exactly as many new tokens: without and with the
measurement of its attention, and a third time without, the control, in turns. The excess is over the mean of the two
plain runs of the same turn. The measured run also writes its records. Peaks of memory are taken in turns as well, and
those of a long run of questions are compared with those of a short one. Pictures are timed apart: they cost the same
for any number of questions.
"""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from .shared.machine import open_console, prepare
from .shared.process_memory import MB, forget_peak, peak
from .shared.random_llava import WORDS, Shape, build, save_processor, save_tokenizer
from .shared.timing import (
    REFERENCE,
    fair_clock,
    figures,
    interleave,
    ratio_table,
    summarise,
    with_reference,
)
from .shared.verdicts import Verdict, table_of, table_of_verdicts, write_json

PLAIN, CONTROL, MEASURED = "generation", "control (generation again)", "diagnose modality"
TIME, MEMORY, GROWTH = 2.0, 1.1, 1.02  # at most so many times as much


@dataclass(frozen=True)
class Workload:
    """What is run.

    Attributes:
        batch: questions that are answered at the same time.
        tokens: new tokens of every answer.
        rounds, peaks: turns of the time, and of the peaks.
        few, many: questions of a short and of a long run.
        narrow: a model for these two. It has as many layers and heads as a large one: what is measured of a question
            does not depend on widths, and would show if it was kept in memory.
    """

    shape: Shape
    narrow: Shape
    batch: int
    tokens: int
    rounds: int
    peaks: int
    few: int
    many: int


# 256 tokens an image; 15 million parameters in the decoder's layers.
FULL = Workload(
    Shape("random", 512, 1408, 5, 8, 400, 512, 2048, 3, 8, 224, 14),
    Shape("narrow", 128, 256, 32, 32, 400, 64, 128, 2, 4, 56, 14),
    batch=8,
    tokens=16,
    rounds=5,
    peaks=3,
    few=20,
    many=200,
)
QUICK = Workload(
    Shape("tiny", 64, 128, 4, 4, 400, 64, 128, 2, 4, 56, 14),
    Shape("narrow", 64, 128, 8, 16, 400, 64, 128, 2, 4, 56, 14),
    batch=4,
    tokens=8,
    rounds=3,
    peaks=2,
    few=8,
    many=24,
)


class Run:
    """Answers questions about random pictures, with or without the measurement.

    Args:
        shape: of the model.
        folder: a new one, for pictures, adapter and records.
    """

    def __init__(self, shape: Shape, work: Workload, dtype: torch.dtype, folder: Path):
        folder.mkdir()
        self.work, self.folder, self._runs = work, folder, 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        self.tokenizer, self.processor = save_tokenizer(folder), save_processor(shape, folder)
        shape = replace(shape, vocabulary=len(self.tokenizer))  # it decodes what the model generates
        self.model = build(shape, self.device, 16).to(dtype).eval()
        self._save_adapter()
        self.names = {"base": "__base__", "MoReS": "adapter"}
        self.pool = _pool(self.model, self.tokenizer, folder / "adapter")
        _draw(folder, shape.side)

    def answering(self) -> Any:
        """Return what answers questions, always with so many tokens."""
        from llava_steering_plugin.inference.asking.answering import AnswerOptions, BatchAnswers
        from llava_steering_plugin.inference.base_model import LoadedBase

        class InOnePrecision(BatchAnswers):
            def pixels(self, batch: Any) -> dict[str, Any]:
                given = super().pixels(batch)
                return {**given, "images": given["images"].to(self.model.dtype)}  # the tower's is not half here

        generation = {"do_sample": False, "min_new_tokens": self.work.tokens, "max_new_tokens": self.work.tokens}
        options = AnswerOptions(self.work.batch, "v1", generation)
        return InOnePrecision(LoadedBase(self.pool, self.tokenizer, self.processor), self.folder, options)

    def questions(self, name: str, count: int) -> list[Any]:
        """Return questions of different lengths."""
        from llava_steering_plugin.inference.asking.questions import Question

        return [Question(n, " ".join(WORDS[: 3 + n % 5]), (f"{n % 4}.png",), self.names[name]) for n in range(count)]

    def generate(self, name: str, count: int) -> None:
        """Answer questions, as `llava-steering eval` does."""
        answering, questions = self.answering(), self.questions(name, count)
        for start in range(0, count, self.work.batch):
            answering.texts(answering.generated(questions[start : start + self.work.batch]))

    def measure(self, name: str, count: int) -> Any:
        """Answer them and measure the attention; return the records."""
        from llava_steering_plugin.diagnostics.modality.one_model import measure_questions
        from llava_steering_plugin.diagnostics.records import Records
        from llava_steering_plugin.inference.models import AnsweringModel

        self._runs += 1
        records = Records(self.folder / f"{self._runs}.jsonl", {})
        answering = self.answering()
        opened = AnsweringModel(answering_base(answering), self.names[name], name, "random")
        for _ in measure_questions(opened, answering, self.questions(name, count), None, records):
            pass
        return records

    def peak_of(self, call: Callable[[], object]) -> float:
        """Return the most memory that the process holds during a call, in MB."""
        gc.collect()
        cuda = self.device.type == "cuda"
        forget_peak(cuda=cuda)
        call()
        return peak(cuda=cuda) / MB

    def _save_adapter(self) -> None:
        from llava_steering_plugin import MoReS, attach, remove_adapter, save_adapter

        attachment = attach(self.model, MoReS(rank=1, tokens="all"))
        with torch.no_grad():
            for parameter in attachment.parameters().values():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        save_adapter(self.model, self.folder / "adapter")
        remove_adapter(self.model)


def answering_base(answering: Any) -> Any:
    """Return the base that something answers with."""
    from llava_steering_plugin.inference.base_model import LoadedBase

    return LoadedBase(answering.pool, answering.tokenizer, answering.processor)


def timed(run: Run, name: str, console: Console) -> dict[str, Any]:
    """Time one batch of a model; return its part of the JSON."""
    count = run.work.batch
    calls: dict[str, Callable[[], object]] = {
        PLAIN: lambda: run.generate(name, count),
        CONTROL: lambda: run.generate(name, count),
        MEASURED: lambda: run.measure(name, count),
    }
    samples = with_reference(interleave(calls, rounds=run.work.rounds, warmup=1, clock=fair_clock()), PLAIN, CONTROL)
    timings = summarise(samples, baseline=REFERENCE)
    console.print(ratio_table(f"{name}: {count} questions, {run.work.tokens} new tokens", timings))
    return {variant: figures(samples, timing) for variant, timing in timings.items()}


def peaks(run: Run, name: str) -> dict[str, float]:
    """Return the peaks of memory with and without the measurement, in MB: medians of turns."""
    count = run.work.batch
    found: dict[str, list[float]] = {PLAIN: [], MEASURED: []}
    for _ in range(run.work.peaks):
        found[PLAIN].append(run.peak_of(lambda: run.generate(name, count)))
        found[MEASURED].append(run.peak_of(lambda: run.measure(name, count)))
    return {variant: median(values) for variant, values in found.items()}


def growth(run: Run) -> dict[str, float]:
    """Return the peaks of a short and of a long measured run with its summary, in MB, and the seconds of pictures."""
    from llava_steering_plugin.diagnostics.modality.summary import summarise_model
    from llava_steering_plugin.diagnostics.pictures.plots import draw_modality

    def whole(count: int) -> dict[str, Any]:
        return summarise_model("base", {}, run.measure("base", count), 0)

    whole(run.work.few)  # imports what summaries need
    few, many = (run.peak_of(lambda count=count: whole(count)) for count in (run.work.few, run.work.many))  # type: ignore[misc]
    summary = whole(run.work.few)
    start = time.perf_counter()
    draw_modality([summary], run.folder / "modality")
    return {"few": few, "many": many, "pictures, seconds": time.perf_counter() - start}


def verdicts(times: Mapping[str, Any], memory: Mapping[str, Any], grown: Mapping[str, float]) -> list[Verdict]:
    """Return the criteria with what was measured."""
    found = []
    for name, of in times.items():
        found.append(Verdict(f"{name}: time of the same generation, times", 1 + of[MEASURED]["excess"], TIME))
        ratio = memory[name][MEASURED] / memory[name][PLAIN]
        found.append(Verdict(f"{name}: peak memory of the same generation, times", ratio, MEMORY))
    found.append(Verdict("peak memory of many questions to few, times", grown["many"] / grown["few"], GROWTH))
    return found


def run(quick: bool, json_file: Path | None, threads: int, dtype: str) -> int:
    """Run the benchmark; return its exit status."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    console, work = open_console(), QUICK if quick else FULL
    about = prepare(threads, dtype, quick)
    console.print(about)
    with tempfile.TemporaryDirectory(prefix="bench-diagnose-") as scratch:
        # First, because memory that was freed before would hide what is kept.
        grown = growth(Run(work.narrow, work, getattr(torch, dtype), Path(scratch) / "many"))
        console.print(f"{work.few} questions: {grown['few']:,.0f} MB, {work.many} questions: {grown['many']:,.0f} MB")
        this = Run(work.shape, work, getattr(torch, dtype), Path(scratch) / "answers")
        times = {name: timed(this, name, console) for name in this.names}
        memory = {name: peaks(this, name) for name in this.names}
        table = table_of("peak memory, MB", ("model", PLAIN, MEASURED))
        for name, of in memory.items():
            table.add_row(name, f"{of[PLAIN]:,.0f}", f"{of[MEASURED]:,.0f}")
        console.print(table)
    rates = {name: work.batch / of[MEASURED]["seconds"] for name, of in times.items()}
    console.print("samples/s with the measurement: " + ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items()))
    console.print(f"pictures afterwards: {grown['pictures, seconds']:.1f} s")
    judged = verdicts(times, memory, grown)
    console.print(table_of_verdicts(judged))
    passed = all(verdict.passed for verdict in judged)
    if json_file is not None:
        content = {"machine": about, "work": asdict(work), "times": times, "peaks": memory, "growth": grown}
        write_json(json_file, {**content, "verdicts": judged, "passed": passed})
    return 0 if passed else 1


def _pool(model: Any, tokenizer: Any, adapter: Path) -> Any:
    from llava_steering_plugin import AdapterPool

    pool = AdapterPool(model, tokenizer)
    pool.load("adapter", str(adapter))
    return pool


def _draw(folder: Path, side: int) -> None:
    import numpy
    from PIL import Image

    draw = numpy.random.default_rng(0)
    for number in range(4):
        Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=numpy.uint8)).save(folder / f"{number}.png")
