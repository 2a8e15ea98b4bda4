"""Measure the choices of one MixLoRA adapter over training data with tasks, and what is lost with other choices."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_steering_plugin.adapters.attachment import required
from llava_steering_plugin.diagnostics.records import KEY, Records
from llava_steering_plugin.diagnostics.steering.one_model import NO_ANSWER
from llava_steering_plugin.diagnostics.task_data import UNKNOWN_TASKS, Sample, samples_by_task
from llava_steering_plugin.errors import ArgumentsError, listing
from llava_steering_plugin.hooks.decoder import find_decoder
from llava_steering_plugin.inference.training_samples import Score
from llava_steering_plugin.measures.routing import (
    SIDES,
    Choices,
    Scores,
    at_random,
    cycled,
    forced_choices,
    most_frequent,
    routed_linears,
    watched_choices,
)
from llava_steering_plugin.modes.mixlora import RoutedLinear

Tasks = Mapping[str, Sequence[Sample]]
# What takes the place of a sample's own choices.
SHUFFLED, WITHIN, FREQUENT, RANDOM = "shuffled", "shuffled_within_task", "most_frequent", "random"
OWN, FORCED = "own", "forced"


def choose_by_task(
    entries: Sequence[tuple[str | None, Sequence[Mapping[str, Any]]]], samples: int, seed: int
) -> dict[str, list[Sample]]:
    """Choose `samples` of each task at random; of a task with fewer, all.

    Args:
        entries: as in `interference.one_model.choose_samples`.

    Raises:
        ArgumentsError: samples name no task, or there are fewer than two samples; all problems at once.
    """
    by_task, problems = samples_by_task(entries)
    if problems:
        raise ArgumentsError(listing(UNKNOWN_TASKS, problems))
    if sum(map(len, by_task.values())) < 2:
        raise ArgumentsError("the data hold fewer than two samples, and choices are shuffled between samples.")
    return {
        name: random.Random(f"{seed}:{name}").sample(each, min(samples, len(each))) for name, each in by_task.items()
    }


@dataclass(frozen=True)
class RoutedModel:
    """The linears of a model that choose factors.

    Attributes:
        linears: by their path.
        names: the number of the layer and the name of the linear in it, such as "0 q_proj", by its path.
        factors: E, how many there are to choose from.
    """

    linears: Mapping[str, RoutedLinear]
    names: Mapping[str, str]
    factors: int

    def named(self, row: Mapping[tuple[str, str], Tensor]) -> dict[str, list[Any]]:
        """Return choices or scores as records keep them: by the linear's name and the side."""
        return {
            f"{self.names[path]} {side}": [round(value, 5) for value in found.tolist()]
            for (path, side), found in row.items()
        }

    def choices(self, named: Mapping[str, Sequence[int]]) -> Choices:
        """Return the choices that a record keeps."""
        return {
            (path, side): torch.tensor(named[f"{name} {side}"]) for path, name in self.names.items() for side in SIDES
        }


def routed_model(model: Any) -> RoutedModel:
    """Return the linears of a model that carries a MixLoRA adapter.

    Raises:
        SteeringError: it carries none.
    """
    linears = routed_linears(required(model).modules)
    layers = {f"{layer.path}.": number for number, layer in enumerate(find_decoder(model)[1].layers)}
    names = {
        path: f"{number} {path.rpartition('.')[2]}"
        for path in linears
        for prefix, number in layers.items()
        if path.startswith(prefix)
    }
    return RoutedModel(linears, names, next(iter(linears.values())).mode.factors)


# Prepares a sample: the function that it returns passes the sample through the model, and scores its answers.
Prepare = Callable[[Sample], Callable[[], Score]]


def passes_of(tasks: Tasks, repeats: int) -> int:
    """Return how many passes a sample takes with choices that are not its own."""
    return 1 + (3 if len(tasks) > 1 else 2) * repeats


def measure_routing(
    routed: RoutedModel, tasks: Tasks, prepare: Prepare, records: Records, repeats: int, seed: int
) -> Iterator[int]:
    """Measure what `records` lacks, and yield the number of passes that are done.

    First come all samples with their own choices, since what takes their place is made from these.

    Args:
        repeats: how often choices are shuffled, and drawn at random.
        seed: of both.
    """
    done, each = 0, passes_of(tasks, repeats)
    for name, samples in tasks.items():
        for sample in samples:
            key = [OWN, name, sample.file, sample.number]
            if key not in records:
                records.add({KEY: key} | _own(routed, prepare(sample)))
            done += 1
            yield done
    usable = measured_samples(records, tasks)
    rows = [routed.choices(record["choices"]) for _, _, record in usable]
    if len(rows) < 2:
        raise ArgumentsError("fewer than two of the samples have answers that the model reads.")
    others = Others(rows, [name for name, _, _ in usable], routed.factors, repeats, seed)
    for number, (name, sample, _) in enumerate(usable):
        key = [FORCED, name, sample.file, sample.number]
        if key not in records:
            score = prepare(sample)
            forced: dict[str, list[list[float]]] = {}
            for variant, several in others.instead_of(number).items():
                forced[variant] = []
                for choices in several:
                    with forced_choices(routed.linears, choices):
                        found = score()
                    forced[variant].append([found.loss, found.accuracy])
            records.add({KEY: key, "forced": forced})
        done += each
        yield done


def measured_samples(records: Records, tasks: Tasks) -> list[tuple[str, Sample, dict[str, Any]]]:
    """Return the samples that were not left out, task by task: the task's name, the sample, its record."""
    own = {tuple(row[KEY][1:]): row for row in records if row[KEY][0] == OWN and "left_out" not in row}
    return [
        (name, sample, own[name, sample.file, sample.number])
        for name, samples in tasks.items()
        for sample in samples
        if (name, sample.file, sample.number) in own
    ]


class Others:
    """Makes the choices that take the place of a sample's own, the same for the same seed.

    Args:
        rows: the choices of all samples.
        tasks: the task of each sample.
    """

    def __init__(self, rows: Sequence[Choices], tasks: Sequence[str], factors: int, repeats: int, seed: int):
        self.rows, self.factors, self.repeats, self.seed = rows, factors, repeats, seed
        self._frequent = most_frequent(rows, factors)
        everywhere = list(range(len(rows)))
        groups = [[number for number in everywhere if tasks[number] == name] for name in dict.fromkeys(tasks)]
        self._shuffled = [self._orders(SHUFFLED, repeat, [everywhere]) for repeat in range(repeats)]
        self._within = [self._orders(WITHIN, repeat, groups) for repeat in range(repeats)] if len(groups) > 1 else []

    def instead_of(self, number: int) -> dict[str, list[Choices]]:
        """Return the choices that take the place of those of sample `number`, by their kind; one for each repeat.

        A sample that is alone in its task has no others of the same task.
        """
        found = {
            FREQUENT: [self._frequent],
            SHUFFLED: [self.rows[order[number]] for order in self._shuffled],
            RANDOM: [
                at_random(self.rows[number], self.factors, self._generator(RANDOM, repeat, number))
                for repeat in range(self.repeats)
            ],
        }
        if self._within and self._within[0][number] != number:
            found[WITHIN] = [self.rows[order[number]] for order in self._within]
        return found

    def _orders(self, kind: str, repeat: int, groups: Sequence[Sequence[int]]) -> dict[int, int]:
        """Give each sample another one of its group."""
        generator = self._generator(kind, repeat)
        return {group[at]: group[other] for group in groups for at, other in enumerate(cycled(len(group), generator))}

    def _generator(self, *what: object) -> torch.Generator:
        return torch.Generator().manual_seed(random.Random(f"{self.seed}:{what}").getrandbits(63))


def _own(routed: RoutedModel, score: Callable[[], Score]) -> dict[str, Any]:
    """Return the record of a sample with its own choices, without its key."""
    scores: list[Scores] = []
    with watched_choices(routed.linears, scores) as rows:
        found = score()
    if math.isnan(found.loss):
        return {"left_out": NO_ANSWER}
    return {
        "loss": found.loss,
        "accuracy": found.accuracy,
        "tokens": found.tokens,
        "choices": routed.named(rows[0]),
        "scores": routed.named(scores[0]),
    }
