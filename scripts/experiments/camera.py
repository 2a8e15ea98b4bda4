"""Compare tunings on the task of the shifted camera: the questions of each kind are a test of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import comparing, scoring, world
from experiments.base import Base, build
from experiments.comparing import Compared, Data
from experiments.settings import FULL_BASE, BaseSettings
from experiments.stages import Context, Done, Runner, Stage
from experiments.tuning import Tuning


@dataclass(frozen=True)
class Settings:
    """Lengths of a comparison on the demo's base.

    Attributes:
        tunings: that are compared.
        base: of the base.
        steps: of each tuning on the shifted camera.
        seeds: of the tunings, each of which is run with every seed.
        questions: test questions, a third of each kind.
        validation: questions on other pictures, which choose learning rates.
        processes: how many trainings run at the same time.
    """

    tunings: tuple[Tuning, ...]
    base: BaseSettings = FULL_BASE
    steps: int = 500
    seeds: tuple[int, ...] = (1, 2, 3)
    questions: int = 900
    validation: int = 300
    processes: int = comparing.PROCESSES


def compare(name: str, settings: Settings, runner: Runner) -> Compared:
    """Compare tunings in the folder `name` of the runner's, on the demo's base, which is made if it is not there."""
    base = build(settings.base, runner)
    asked = questions(f"{name}/questions", settings.validation, settings.questions, runner)
    file = runner.root / name / "compare.yaml"
    comparing.write_file(
        file,
        base,
        data(base, asked),
        settings.tunings,
        steps=settings.steps,
        batch=settings.base.batch,
        seeds=settings.seeds,
        processes=settings.processes,
    )
    return comparing.run(file, settings.tunings, runner)


def pictures(base: Base) -> Path:
    """Return the folder of the pictures that the shifted camera took."""
    return base.data.folder / "pictures" / "shifted"


def questions(name: str, validation: int, test: int, runner: Runner) -> Done:
    """Write that many questions of both splits, a third of each kind, and those of the test by kind too."""
    counts = {"validation": validation, "test": test}

    def work(stage: Context) -> dict[str, Any]:
        halves = world.halves(world.Split.load("test").questions)
        for (split, count), of_split in zip(counts.items(), halves, strict=True):
            sample = [
                scoring.Asked(f"test/{one.image}.png", one.text, one.answer, one.kind)
                for one in world.test_sample(of_split, count)
            ]
            scoring.write_questions(stage.folder / f"{split}.jsonl", sample)
        for kind in world.KINDS:  # of the test, which is the last
            scoring.write_questions(stage.folder / _file(kind), (one for one in sample if one.kind == kind))
        return {}

    return runner.run(Stage(name, counts, (), work, (world, scoring)))


def data(base: Base, asked: Done) -> Data:
    """Return the task of the shifted camera."""
    train, validation = base.data.folder / "train.json", asked.folder / "validation.jsonl"
    test = {kind: asked.folder / _file(kind) for kind in world.KINDS}
    return Data("shifted camera", train, pictures(base), validation, test)


def _file(kind: str) -> str:
    return f"test-{kind.replace('/', '-')}.jsonl"
