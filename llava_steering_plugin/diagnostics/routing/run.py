"""Measure the routing of several adapters one after another, and write what came out."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_steering_plugin.adapters.attachment import required
from llava_steering_plugin.diagnostics.pictures.routing import draw_routing
from llava_steering_plugin.diagnostics.records import Records, open_records
from llava_steering_plugin.diagnostics.results import Progress, digest, write_tables
from llava_steering_plugin.diagnostics.routing.one_model import (
    FORCED,
    OWN,
    Tasks,
    choose_by_task,
    measure_routing,
    measured_samples,
    passes_of,
    routed_model,
)
from llava_steering_plugin.diagnostics.routing.summary import routing_rows, summarise_routing
from llava_steering_plugin.diagnostics.task_data import CONVERSATION, check_samples, open_samples, read_entries
from llava_steering_plugin.inference.tunable import open_tunable
from llava_steering_plugin.modes.joint import parts_of

MODE = "mixlora"
INDEPENDENT, CONDITIONAL = "independent", "conditional"


@dataclass(frozen=True)
class RoutingRequest:
    """Holds what is asked of one run.

    Attributes:
        models: the path of each adapter, by the name that pictures and tables give it.
        files: the data files, each with the task of all of its samples; None: each sample names its own.
        images: the folder of the images.
        samples: of each task.
        repeats: how often choices are shuffled, and drawn at random.
        seed: chooses the samples, and what takes the place of their choices.
        conversation: the template; None: each adapter's own.
        base: where the base is, if it has moved.
        how: `device`, `load_4bit`, `load_8bit`.
        output: the folder of everything that is written.
    """

    models: Mapping[str, str]
    files: Sequence[tuple[str | None, Path]]
    images: Path
    samples: int
    repeats: int
    seed: int
    conversation: str | None
    base: str | None
    how: Mapping[str, Any]
    output: Path


def read_chosen(request: RoutingRequest) -> dict[str, list[Any]]:
    """Read the data files, and choose the samples of each task.

    Raises:
        ArgumentsError: a file cannot be read, the tasks are not known, or LLaVA cannot be trained on a chosen sample.
    """
    entries = read_entries(request.files)
    chosen = choose_by_task(entries, request.samples, request.seed)
    samples = [sample for each in chosen.values() for sample in each]
    check_samples(request.files, entries, samples, request.images, request.conversation)
    return chosen


def run_routing(request: RoutingRequest, progress: Progress) -> list[Path]:
    """Measure all adapters, and return the files of the result.

    Raises:
        SteeringError: a model cannot be loaded, or a file cannot be read; what was measured before is kept.
    """
    tasks = read_chosen(request)
    settings = {
        "measure": "routing",
        "data": [[task, digest(file)] for task, file in request.files],
        "samples": request.samples,
        "repeats": request.repeats,
        "seed": request.seed,
        "conversation": request.conversation,
        **{name: value for name, value in request.how.items() if name != "device"},
    }
    kept = open_records(request.output / "routing", settings, request.models, request.base)
    summaries = []
    for name, path in request.models.items():
        about = _measure(request, name, path, tasks, kept[name], progress)
        summaries.append(summarise_routing(name, about, kept[name], tasks, request.seed))
        gc.collect()  # the next model needs the memory
    document = {"settings": settings, "tasks": list(tasks), "models": summaries}
    target = request.output / "routing"
    return [*write_tables(document, routing_rows(document), target), *draw_routing(document, target)]


def _measure(
    request: RoutingRequest, name: str, path: str, tasks: Tasks, records: Records, progress: Progress
) -> dict[str, Any]:
    """Measure what is missing of one adapter, and return what is known of it."""
    total = sum(map(len, tasks.values())) * (1 + passes_of(tasks, request.repeats))
    if (known := records.about()) is not None and _whole(records, tasks):
        progress(name, total, total)
        return known
    opened = open_tunable(path, request.base, request.how)
    template = request.conversation or opened.conversation or CONVERSATION
    files = open_samples(opened, request.files, request.images, template)
    routed, mode = routed_model(opened.model), required(opened.model).mode
    done = measure_routing(
        routed,
        tasks,
        lambda sample: files[sample.file].scored(sample.number),
        records,
        request.repeats,
        request.seed,
    )
    for passes in done:
        progress(name, passes, total)
    (routing,) = (part for part in parts_of(mode) if part.name == MODE)
    settings = routing.settings()
    return records.note(
        {
            "kind": opened.kind,
            "path": path,
            "base": opened.base,
            "conversation": template,
            "adapter": mode.settings(),
            "factors": routed.factors,
            "chosen": settings["rank"],
            "selection": {"A": INDEPENDENT, "B": CONDITIONAL if settings["conditional"] else INDEPENDENT},
        }
    )


def _whole(records: Records, tasks: Tasks) -> bool:
    """Tell whether nothing is missing."""
    own = all([OWN, name, each.file, each.number] in records for name, samples in tasks.items() for each in samples)
    usable = measured_samples(records, tasks)
    return own and all([FORCED, name, each.file, each.number] in records for name, each, _ in usable) and bool(usable)
