"""Measure interference for several adapters one after another, and write what came out."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_steering_plugin.diagnostics.interference.one_model import (
    Sample,
    TaskSamples,
    choose_samples,
    effects_in,
    grouped,
    interference_rows,
    measure_tasks,
    summarise_interference,
)
from llava_steering_plugin.diagnostics.pictures.heat_maps import draw_interference
from llava_steering_plugin.diagnostics.records import Records, open_records
from llava_steering_plugin.diagnostics.results import Progress, digest, write_tables
from llava_steering_plugin.errors import ArgumentsError, listing, shortened
from llava_steering_plugin.inference.training_samples import TrainingSamples
from llava_steering_plugin.inference.tunable import open_tunable
from llava_steering_plugin.training.data.sample_checks import SampleChecks, name_of, style_of

CONVERSATION = "v1"  # the --version that LLaVA-1.5 trains with


@dataclass(frozen=True)
class InterferenceRequest:
    """Holds what is asked of one run.

    Attributes:
        models: the path of each adapter or LoRA, by the name that pictures and tables give it.
        files: the data files, each with the task of all of its samples; None: each sample names its own.
        images: the folder of the images.
        samples: of each task, for each of the two batches.
        seed: chooses them.
        conversation: the template; None: each adapter's own.
        base: where the base is, if it has moved.
        how: `device`, `load_4bit`, `load_8bit`.
        output: the folder of everything that is written.
    """

    models: Mapping[str, str]
    files: Sequence[tuple[str | None, Path]]
    images: Path
    samples: int
    seed: int
    conversation: str | None
    base: str | None
    how: Mapping[str, Any]
    output: Path


def read_tasks(request: InterferenceRequest) -> dict[str, TaskSamples]:
    """Read the data files, and choose the samples of each task.

    Raises:
        ArgumentsError: a file cannot be read, the tasks are not known, or LLaVA cannot be trained on a chosen sample.
    """
    entries = read_entries(request.files)
    chosen = choose_samples(entries, request.samples, request.seed)
    samples = [sample for batches in chosen.values() for sample in (*batches.steps, *batches.losses)]
    check_samples(request.files, entries, samples, request.images, request.conversation)
    return chosen


Entries = Sequence[tuple[str | None, Sequence[Mapping[str, Any]]]]


def read_entries(files: Sequence[tuple[str | None, Path]]) -> Entries:
    """Read data files: the samples of each, with the task of all of them; None: each sample names its own.

    Raises:
        ArgumentsError: some cannot be read, or are given twice; the message lists them all.
    """
    entries, problems = [], []
    times = Counter(file.resolve() for _, file in files)
    problems += [f"{file} is given {count} times; give it once" for file, count in times.items() if count > 1]
    for task, file in files:
        try:
            listed = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
                raise ValueError("it is no list of samples")
            entries.append((task, listed))
        except (OSError, ValueError) as error:
            problems.append(f"the data in {file} cannot be read: {error}")
    if problems:
        raise ArgumentsError(listing("some data cannot be used", problems))
    return entries


def check_samples(
    files: Sequence[tuple[str | None, Path]],
    entries: Entries,
    samples: Sequence[Sample],
    images: Path,
    conversation: str | None,
) -> None:
    """Check samples as a training would.

    Raises:
        ArgumentsError: LLaVA cannot be trained on some of them; the message lists them, or the first ones of many.
    """
    checks = SampleChecks(str(images), style=style_of(conversation or CONVERSATION))
    if not images.is_dir() and any(entries[sample.file][1][sample.number].get("image") for sample in samples):
        raise ArgumentsError(f"there is no folder {images}, where the images of the samples should be.")
    problems = [
        f"{files[sample.file][1]}: {name_of(sample.number, entry)}: {defect.reason}"
        for sample in samples
        for entry in [entries[sample.file][1][sample.number]]
        for defect in checks.of(entry, whole=True)
    ]
    if problems:
        raise ArgumentsError(listing("LLaVA cannot be trained on some of the chosen samples", shortened(problems)))


def run_interference(request: InterferenceRequest, progress: Progress) -> list[Path]:
    """Measure all models, and return the files of the result.

    Raises:
        SteeringError: a model cannot be loaded, or a file cannot be read; what was measured before is kept.
    """
    tasks = read_tasks(request)
    settings = {
        "measure": "interference",
        "data": [[task, digest(file)] for task, file in request.files],
        "samples": request.samples,
        "seed": request.seed,
        "conversation": request.conversation,
        **{name: value for name, value in request.how.items() if name != "device"},
    }
    kept = open_records(request.output / "interference", settings, request.models, request.base)
    summaries = []
    for name, path in request.models.items():
        about = _measure(request, name, path, tasks, kept[name], progress)
        summaries.append(summarise_interference(name, about, effects_in(kept[name], list(tasks))))
        gc.collect()  # the next model needs the memory
    document = {"settings": settings, "tasks": list(tasks), "models": summaries}
    tables = write_tables(document, interference_rows(document), request.output / "interference")
    return [*tables, *draw_interference(document, request.output / "interference")]


def _measure(
    request: InterferenceRequest,
    name: str,
    path: str,
    tasks: Mapping[str, TaskSamples],
    records: Records,
    progress: Progress,
) -> dict[str, Any]:
    """Measure what is missing of one model, and return what is known of it."""
    total = sum(len(each.steps) + len(each.losses) for each in tasks.values())
    opened = open_tunable(path, request.base, request.how)
    template = request.conversation or opened.conversation or CONVERSATION
    files = [
        TrainingSamples(opened.model, opened.tokenizer, opened.processor, file, request.images, template)
        for _, file in request.files
    ]
    groups = grouped(opened.parameters)
    for done in measure_tasks(groups, tasks, lambda sample: files[sample.file].loss(sample.number), records):
        progress(name, done, total)
    return {"kind": opened.kind, "path": path, "base": opened.base, "conversation": template}
