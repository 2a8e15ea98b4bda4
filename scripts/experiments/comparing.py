"""Compare tunings of the base with `llava-steering compare`: write its file, run it, and read what comes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from experiments.base import Base
from experiments.commands import BATCH, NEW_TOKENS, SHARED
from experiments.stages import SEED_OF_HASHES, Runner, StageError
from experiments.tuning import Tuning
from llava_steering_plugin.comparison.records import FILE, TEST, read_records

# Models this small do not gain from a second thread.
PROCESSES, THREADS = 2, 1
OUTPUT, RESULTS = "compare", "results.json"
# The one test of the validation split: it only has to choose, and each test is a program to start.
ALL = "all questions"


@dataclass(frozen=True)
class Data:
    """What is compared on.

    Attributes:
        pictures: the folder of all images.
        validation: the questions that choose learning rates.
        test: question files by the names of their tests.
    """

    name: str
    train: Path
    pictures: Path
    validation: Path
    test: Mapping[str, Path]


@dataclass(frozen=True)
class Tested:
    """One training at the chosen learning rate.

    Attributes:
        slug: of the tuning.
        cell: changes with all that the training depends on.
        parameters: that were trained.
        accuracy: the share of right answers to each test.
    """

    slug: str
    seed: int
    cell: str
    adapter: Path
    parameters: int
    accuracy: dict[str, float]


@dataclass(frozen=True)
class Compared:
    """What came out of a comparison.

    Attributes:
        document: results.json.
        tested: seed by seed, in the order of the tunings.
    """

    document: dict[str, Any]
    tested: tuple[Tested, ...]

    @property
    def firsts(self) -> dict[str, Tested]:
        """Return the training of each tuning at the first seed, by the tuning's slug, in the order of the tunings."""
        found: dict[str, Tested] = {}
        for each in self.tested:
            found.setdefault(each.slug, each)
        return found


def write_file(
    file: Path,
    base: Base,
    data: Data,
    tunings: Sequence[Tuning],
    *,
    steps: int,
    batch: int,
    seeds: Sequence[int],
    processes: int = PROCESSES,
) -> None:
    """Write the YAML of a comparison; its results go into a folder beside it."""
    content = {
        "base": str(base.model),
        "output": OUTPUT,
        "processes": processes,
        "seeds": list(seeds),
        "learning_rates": list(tunings[0].rates),
        "defaults": {
            **SHARED,
            "vision_tower": str(base.clip),
            "freeze_mm_mlp_adapter": True,
            "max_steps": steps,
            "per_device_train_batch_size": batch,
        },
        "methods": {each.name: {**each.flags, "learning_rates": list(each.rates)} for each in tunings},
        "tasks": {
            data.name: {
                "train": str(data.train),
                "image_folder": str(data.pictures),
                **{
                    split: _tests(files)
                    for split, files in (("validation", {ALL: data.validation}), ("test", data.test))
                },
            }
        },
        "answers": {"conv_mode": "v1", "max_new_tokens": NEW_TOKENS, "batch_size": BATCH, "device": "cpu"},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content, sort_keys=False))


def _tests(files: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Return the tests of question files whose lines have their answers."""
    return {
        name: {"questions": str(questions), "annotations": str(questions), "benchmark": "exact_match"}
        for name, questions in files.items()
    }


def run(file: Path, tunings: Sequence[Tuning], runner: Runner) -> Compared:
    """Run a comparison, or what is left of it, and return what came out.

    Raises:
        StageError: it ended with an error. Cells that are done stay, and the next run goes on.
    """
    command = [sys.executable, "-m", "llava_steering_plugin", "compare", str(file)]
    env = {**os.environ, **SEED_OF_HASHES, "OMP_NUM_THREADS": str(THREADS)}
    with runner.paused():
        status = subprocess.run(command, env=env, check=False).returncode
    if status:
        raise StageError(f"`llava-steering compare {file}` ended with {status}; what it printed says why")
    return read(file.parent / OUTPUT, tunings)


def read(output: Path, tunings: Sequence[Tuning]) -> Compared:
    """Return what came out of a comparison."""
    slugs = {tuning.name: tuning.slug for tuning in tunings}
    order = list(slugs)
    records = [each for each in read_records(output / FILE) if each.split == TEST and each.method in slugs]
    records.sort(key=lambda record: (record.seed, order.index(record.method)))
    tested = tuple(
        Tested(
            slugs[each.method],
            each.seed,
            each.cell,
            output / each.adapter,
            each.trained_parameters,
            {test: score.score / 100 for test, score in each.scores.items()},
        )
        for each in records
    )
    return Compared(json.loads((output / RESULTS).read_text()), tested)


def table_of(document: Mapping[str, Any]) -> Table:
    """Return the scores of results.json in percent, mean and deviation over seeds, a line for each method."""
    (task,) = document["tasks"]
    shown = Table(title=f"Right answers in %: {task['task']}", title_justify="left")
    shown.add_column("model")
    for column in ("trained", "learning rate", "seeds", *task["tests"]):
        shown.add_column(column, justify="right")
    for one in task["methods"]:
        shown.add_row(
            one["method"],
            f"{one['costs']['trained_parameters']:,}" if one["costs"] else "",
            "" if one["rate"] is None else f"{one['rate']:g}",
            f"{len(one['done'])} of {len(one['seeds'])}",
            *(spread(one["outcomes"][test]["score"]) for test in task["tests"]),
        )
    return shown


def spread(score: Mapping[str, Any] | None) -> str:
    """Return a mean with its standard deviation, if it has one."""
    if score is None:
        return "-"
    return f"{score['mean']:.1f}" + ("" if score["deviation"] is None else f" ±{score['deviation']:.1f}")
