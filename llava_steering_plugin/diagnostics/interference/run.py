"""Measure interference for several adapters one after another, and write what came out."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_steering_plugin.diagnostics.interference.one_model import (
    TaskSamples,
    choose_samples,
    effects_in,
    grouped,
    interference_rows,
    is_measured,
    measure_tasks,
    summarise_interference,
)
from llava_steering_plugin.diagnostics.pictures.heat_maps import draw_interference
from llava_steering_plugin.diagnostics.records import Records, open_records
from llava_steering_plugin.diagnostics.results import Progress, digest, write_tables
from llava_steering_plugin.diagnostics.task_data import CONVERSATION, check_samples, open_samples, read_entries
from llava_steering_plugin.inference.tunable import open_tunable


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
    if (known := records.about()) is not None and is_measured(records, tasks):
        progress(name, total, total)
        return known
    opened = open_tunable(path, request.base, request.how)
    template = request.conversation or opened.conversation or CONVERSATION
    files = open_samples(opened, request.files, request.images, template)
    groups = grouped(opened.parameters)
    for done in measure_tasks(groups, tasks, lambda sample: files[sample.file].loss(sample.number), records):
        progress(name, done, total)
    return records.note({"kind": opened.kind, "path": path, "base": opened.base, "conversation": template})
