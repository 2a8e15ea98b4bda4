"""Prepare the task of the shifted camera for a comparison: the questions of each kind are a test of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments import scoring, world
from experiments.base import Base
from experiments.comparing import Data
from experiments.stages import Context, Done, Runner, Stage


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
