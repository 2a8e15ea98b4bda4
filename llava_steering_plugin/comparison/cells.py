"""List the cells of a comparison: one training each, with an id that changes with all that its result depends on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llava_steering_plugin.comparison.records import SPLITS
from llava_steering_plugin.comparison.schema import Comparison, Method, Task, Test
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.inference.asking.answers_file import contents_of

FOLDER = "cells"
BASE = "base (frozen)"


@dataclass(frozen=True)
class Cell:
    """One training of a method for a task, or the base itself.

    Attributes:
        rate: the learning rate; 0.0 for the base, which is not trained.
        content: all that the training depends on, as JSON values. Its digest is in the id.
    """

    task: Task
    method: Method
    rate: float
    seed: int
    content: Mapping[str, Any] = field(compare=False)

    @cached_property
    def id(self) -> str:
        """Return the name of the cell's folder: words for people, and a digest of the content."""
        words = [self.task.name, self.method.name]
        words += [] if self.method.frozen else [f"lr{self.rate:g}", f"seed{self.seed}"]
        return f"{'-'.join(map(readable, words))}-{mark_of(self.content)}"

    def folder(self, output: Path) -> Path:
        """Return the cell's folder."""
        return output / FOLDER / self.id

    def named(self) -> str:
        """Return how the cell is called in messages."""
        own = "" if self.method.frozen else f", learning rate {self.rate:g}, seed {self.seed}"
        return f"{self.task.name}, {self.method.name}{own}"


def readable(name: str) -> str:
    """Return a name as a part of a file's name: names are anything that people write, and never paths."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_.")[:40]


def mark_of(content: Any) -> str:
    """Return a short digest of JSON values."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Plan:
    """The cells of a comparison.

    Attributes:
        cells: in the order in which they are run: the base first, then seed by seed.
        marks: by task and split, what evaluations depend on besides the cell.
    """

    comparison: Comparison
    cells: tuple[Cell, ...]
    marks: Mapping[tuple[str, str], str]

    def of(self, task: Task, method: Method) -> list[Cell]:
        """Return the cells of a method for a task."""
        return [cell for cell in self.cells if cell.task is task and cell.method is method]


def plan_cells(comparison: Comparison) -> Plan:
    """List the cells. It reads the data files, of which the ids hold digests.

    The base itself is always among them, for the others to be compared with.

    Raises:
        ArgumentsError: a file cannot be read.
    """
    base = contents_of(comparison.base, hashed=False)
    digests: dict[Path, str] = {}

    def digest(file: Path) -> str:
        if file not in digests:
            digests[file] = _digest(file)
        return digests[file]

    methods = list(comparison.methods)
    if not any(method.frozen for method in methods):
        methods.insert(0, Method(BASE, {}, True, ()))
    cells = []
    for seed in comparison.seeds:
        for task in comparison.tasks:
            for method in methods:
                if method.frozen and seed != comparison.seeds[0]:
                    continue
                for rate in method.rates or (0.0,):
                    content: dict[str, Any] = {
                        "task": task.name,
                        "method": method.name,
                        "base": [comparison.base, base],
                    }
                    if not method.frozen:
                        content |= {
                            "flags": dict(method.flags),
                            "learning rate": rate,
                            "seed": seed,
                            "train": [str(task.train), digest(task.train)],
                            "images": str(task.image_folder),
                            "program": [comparison.program, *comparison.launcher],
                        }
                    cells.append(Cell(task, method, rate, seed, content))
    cells.sort(key=lambda cell: not cell.method.frozen)
    marks = {
        (task.name, split): mark_of([comparison.answers, [_of_test(test, digest) for test in tests_of(task, split)]])
        for task in comparison.tasks
        for split in SPLITS
    }
    return Plan(comparison, tuple(cells), marks)


def tests_of(task: Task, split: str) -> tuple[Test, ...]:
    """Return the tests of a split."""
    return task.validation if split == SPLITS[0] else task.test


def _of_test(test: Test, digest: Any) -> list[Any]:
    annotations = digest(test.annotations) if test.annotations.is_file() else "folder"
    return [
        test.name, digest(test.questions), str(test.annotations), annotations, test.benchmark,
        str(test.image_folder), test.split, test.metric,
    ]  # fmt: skip


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            while part := opened.read(1 << 20):
                digest.update(part)
    except OSError as error:
        raise ArgumentsError(f"{file} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()
