"""Run the stages that make the base: data, vision tower, language model, projector, and upstream's full tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import backbone, commands, world
from experiments.settings import CAMERA, TURNS, BaseSettings
from experiments.stages import Context, Done, Runner, Stage

Work = Callable[[Context], dict[str, Any]]


@dataclass(frozen=True)
class Base:
    """A finished LLaVA that knows easy-VQA through the clean camera.

    Attributes:
        done: its last stage.
        data, tower: the stages that later stages need, too.
        stages: all its stages, in order.
    """

    done: Done
    data: Done
    tower: Done
    stages: tuple[Done, ...]

    @property
    def model(self) -> Path:
        return self.done.folder / "llava-v1-base"

    @property
    def clip(self) -> Path:
        return self.tower.folder / "clip-tower"


def build(settings: BaseSettings, runner: Runner) -> Base:
    """Make the base, or find it done in the runner's folder."""
    data = runner.run(Stage("data", {"camera": CAMERA, "turns": TURNS}, (), _data, (world,)))
    tower = runner.run(Stage("tower", {"epochs": settings.tower_epochs}, (), _tower(settings), (backbone,)))
    llm = runner.run(Stage("language-model", {}, (), _language_model, (backbone, world)))
    lengths = {"steps": settings.projector_steps, "batch": settings.batch}
    work = _projector(settings, data, tower, llm)
    projector = runner.run(Stage("stage-1-projector", lengths, (data, tower, llm), work, (commands,)))
    lengths = {"steps": settings.tuning_steps, "batch": settings.batch}
    work = _base(settings, data, tower, llm, projector)
    base = runner.run(Stage("stage-2-base", lengths, (projector,), work, (commands,)))
    return Base(base, data, tower, (data, tower, llm, projector, base))


def _data(stage: Context) -> dict[str, Any]:
    world.write(stage.folder)
    return {}


def _tower(settings: BaseSettings) -> Work:
    return lambda stage: backbone.build_tower(stage.folder / "clip-tower", settings.tower_epochs, stage.report)


def _language_model(stage: Context) -> dict[str, Any]:
    backbone.build_language_model(stage.folder / "llm")
    return {}


def _projector(settings: BaseSettings, data: Done, tower: Done, llm: Done) -> Work:
    def work(stage: Context) -> dict[str, Any]:
        output = stage.folder / "projector"
        stage.run(commands.stage_1(settings, output, llm.folder / "llm", data.folder, tower.folder / "clip-tower"))
        return {}

    return work


def _base(settings: BaseSettings, data: Done, tower: Done, llm: Done, projector: Done) -> Work:
    def work(stage: Context) -> dict[str, Any]:
        weights = projector.folder / "projector" / "mm_projector.bin"
        output, clip = stage.folder / "llava-v1-base", tower.folder / "clip-tower"
        stage.run(commands.stage_2(settings, output, llm.folder / "llm", weights, data.folder, clip))
        return {}

    return work
