"""Read training data with the tasks of its samples, as the diagnoses of tasks take it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_steering_plugin.errors import ArgumentsError, listing, shortened
from llava_steering_plugin.inference.training_samples import TrainingSamples
from llava_steering_plugin.inference.tunable import TunableModel
from llava_steering_plugin.training.data.sample_checks import SampleChecks, name_of, style_of

CONVERSATION = "v1"  # the --version that LLaVA-1.5 trains with
UNKNOWN_TASKS = 'the tasks cannot be told; give each sample a "task", or --data TASK=FILE for every task'
# The samples of each data file, with the task of all of them; None: each sample names its own.
Entries = Sequence[tuple[str | None, Sequence[Mapping[str, Any]]]]


@dataclass(frozen=True)
class Sample:
    """Names a sample of a task: the number of its file among those given, and its own in that file."""

    file: int
    number: int


def samples_by_task(entries: Entries) -> tuple[dict[str, list[Sample]], list[str]]:
    """Return the samples of each task in the order in which the tasks appear, and what is wrong with the names.

    Args:
        entries: the samples of each file, with the task of all of them; None: each sample names its `task`.
    """
    by_task: dict[str, list[Sample]] = defaultdict(list)
    problems = []
    for file, (task, listed) in enumerate(entries):
        nameless = 0
        for number, entry in enumerate(listed):
            name = task or entry.get("task")
            if isinstance(name, str) and name:
                by_task[name].append(Sample(file, number))
            else:
                nameless += 1
        if nameless:
            problems.append(f"{nameless} of {len(listed)} samples of file {file + 1} name no task")
    return dict(by_task), problems


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


def open_samples(
    opened: TunableModel, files: Sequence[tuple[str | None, Path]], images: Path, template: str
) -> list[TrainingSamples]:
    """Return the samples of each file as a model is trained on them in a conversation template."""
    return [
        TrainingSamples(opened.model, opened.tokenizer, opened.processor, file, images, template) for _, file in files
    ]
