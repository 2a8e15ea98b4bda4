"""Measure interference between the tasks of some training data, for adapters and LoRAs, and keep what is measured."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llava_steering_plugin.adapters.fit.base_model import PROJECTOR_PREFIX
from llava_steering_plugin.diagnostics.records import KEY, Records
from llava_steering_plugin.diagnostics.task_data import UNKNOWN_TASKS, Entries, Sample, samples_by_task
from llava_steering_plugin.errors import ArgumentsError, listing
from llava_steering_plugin.measures.interference import EVERYTHING, Effects, Interference, gathered
from llava_steering_plugin.whole_files import partials

# How the last part of a parameter's name is shown; other names stand for themselves.
SIDES = {"routed_a": "A", "routed_b": "B", "lora_A": "A", "lora_B": "B"}
ROUTERS = "routers"


@dataclass(frozen=True)
class TaskSamples:
    """Holds two independent batches of one task.

    Attributes:
        steps: the samples whose gradients are stepped along.
        losses: the samples whose losses are looked at.
    """

    steps: Sequence[Sample]
    losses: Sequence[Sample]


def choose_samples(entries: Entries, samples: int, seed: int) -> dict[str, TaskSamples]:
    """Choose two batches of `samples` for each task at random; of a task with too few, halves of what there is.

    Args:
        entries: the samples of each file, with the task of all of them; None: each sample names its `task`.

    Returns:
        the batches by the task's name, in the order in which the tasks appear.

    Raises:
        ArgumentsError: samples name no task, there is only one, or a task has a single sample; all problems at once.
    """
    by_task, problems = samples_by_task(entries)
    if len(by_task) < 2 and not problems:
        what = f"all samples are of the task {next(iter(by_task))!r}" if by_task else "the data hold no samples"
        problems.append(f"{what}, and interference is between two tasks or more")
    problems += [f"the task {name!r} has one sample; it needs two" for name, found in by_task.items() if len(found) < 2]
    if problems:
        raise ArgumentsError(listing(UNKNOWN_TASKS, problems))
    chosen = {}
    for name, found in by_task.items():
        order = random.Random(f"{seed}:{name}").sample(found, len(found))
        size = min(samples, len(found) // 2)
        chosen[name] = TaskSamples(order[:size], order[size : 2 * size])
    return chosen


@dataclass(frozen=True)
class Place:
    """Says where a group of parameters is: the number of the layer, the linear in it, and the side (A, B, routers)."""

    layer: int | None
    linear: str
    side: str

    def __str__(self) -> str:
        return " ".join(str(part) for part in (self.layer, self.linear, self.side) if part is not None)


def grouped(parameters: Mapping[str, nn.Parameter]) -> dict[Place, list[nn.Parameter]]:
    """Return an adapter's parameters by layer, linear and side."""
    groups: dict[Place, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters.items():
        parts = [part for part in name.split(".") if part not in ("weight", "default")]
        layer = re.search(r"layers\.(\d+)\.", name)
        if name.startswith(PROJECTOR_PREFIX) and not layer:
            module, _, leaf = name.removeprefix("model.").rpartition(".")
            groups[Place(None, module, leaf)].append(parameter)
            continue
        side = ROUTERS if parts[-1].startswith("router_") else SIDES.get(parts[-1], parts[-1])
        groups[Place(int(layer[1]) if layer else None, parts[-2], side)].append(parameter)
    return dict(groups)


Loss = Callable[[Sample], Tensor]


def measure_tasks(
    groups: Mapping[Place, Sequence[nn.Parameter]],
    tasks: Mapping[str, TaskSamples],
    loss: Loss,
    records: Records,
) -> Iterator[int]:
    """Measure all tasks on one model, and yield the number of gradients that are done.

    Args:
        loss: computes the loss of one sample.
        records: gets the effects, a record for each sample. Beside its file, the directions of the tasks are kept.
    """
    measure = Interference({str(place): group for place, group in groups.items()}, len(tasks))
    done = 0
    for number, samples in enumerate(tasks.values()):
        kept = records.file.with_suffix(f".{number}.safetensors")
        if kept.is_file() and _mark_of(kept) == records.mark:
            _load_directions(measure, number, kept)
        else:
            for sample in samples.steps:
                measure.step(number, lambda sample=sample: loss(sample))  # type: ignore[misc]
                done += 1
                yield done
            _save_directions(measure, number, kept, records.mark)
        done = sum(len(each.steps) for each in list(tasks.values())[: number + 1])
        yield done
    for name, samples in tasks.items():
        for sample in samples.losses:
            key = [name, sample.file, sample.number]
            if key not in records:
                effects = measure.effect(lambda sample=sample: loss(sample))  # type: ignore[misc]
                records.add({KEY: key, "effects": effects})
            done += 1
            yield done


def is_measured(records: Records, tasks: Mapping[str, TaskSamples]) -> bool:
    """Say whether the effects of all samples are there."""
    return all([name, each.file, each.number] in records for name, batch in tasks.items() for each in batch.losses)


def effects_in(records: Records, tasks: Sequence[str]) -> dict[str, Effects]:
    """Return what was measured, for each group of parameters."""
    rows = {name: [row["effects"] for row in records if row[KEY][0] == name] for name in tasks}
    groups = next(iter(rows.values()))[0]
    return {group: gathered([[row[group] for row in rows[name]] for name in tasks]) for group in groups}


def _mark_of(file: Path) -> str | None:
    """Return of which settings the directions in a file are."""
    with safe_open(file, "pt") as directions:
        return (directions.metadata() or {}).get("settings")


def _save_directions(measure: Interference, task: int, file: Path, mark: str) -> None:
    tensors = {
        f"{name}/{number}": tensor.contiguous().cpu()
        for name, parts in measure.directions[task].items()
        for number, tensor in enumerate(parts)
    }
    tensors |= {f"{name}/used": used for name, used in measure.used[task].items()}
    with partials(file) as (part,):
        save_file(tensors, part, {"settings": mark})


def _load_directions(measure: Interference, task: int, file: Path) -> None:
    tensors = load_file(file)
    for name, parts in measure.directions[task].items():
        for number, tensor in enumerate(parts):
            tensor.copy_(tensors[f"{name}/{number}"])
        measure.used[task][name] = tensors[f"{name}/used"]


def summarise_interference(name: str, about: Mapping[str, Any], effects: Mapping[str, Effects]) -> dict[str, Any]:
    """Return what was measured of one model, ready for JSON: matrices [tasks i][tasks j] by group.

    `sides` holds the means over the groups of each side, which pictures show.
    """
    matrices = {
        group: {
            "mean_of_ratios": found.mean_of_ratios(),
            "ratio_of_means": found.ratio_of_means(),
            "ratio_of_means_shared": found.ratio_of_means(shared=True),
        }
        for group, found in effects.items()
    }
    sides: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for group, kinds in matrices.items():
        for kind, matrix in kinds.items():
            sides[EVERYTHING if group == EVERYTHING else group.rpartition(" ")[2]][kind].append(matrix)
    return {
        "name": name,
        **about,
        "samples": [len(each) for each in next(iter(effects.values())).by_sample],
        "groups": {group: {kind: _plain(each) for kind, each in kinds.items()} for group, kinds in matrices.items()},
        "sides": {
            side: {kind: _plain(torch.stack(found).nanmean(0)) for kind, found in kinds.items()}
            for side, kinds in sides.items()
        },
    }


def interference_rows(document: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Yield the rows of interference.csv, the heading first: one for each model, group, kind of ratio and two tasks."""
    yield ["model", "group", "quantity", "loss of", "step for", "value"]
    tasks = document["tasks"]
    for model in document["models"]:
        for group, kinds in model["groups"].items():
            for kind, matrix in kinds.items():
                for i, row in enumerate(matrix):
                    for j, value in enumerate(row):
                        yield [model["name"], group, kind, tasks[i], tasks[j], value]


def _plain(matrix: Tensor) -> list[list[float | None]]:
    return [[None if value != value else float(f"{value:.6g}") for value in row] for row in matrix.tolist()]
