"""Describe ways to tune the base by a name and upstream's flags, and build the stage that trains one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import commands, scoring
from experiments.base import Base
from experiments.settings import SEED
from experiments.stages import Context, Done, Stage


@dataclass(frozen=True)
class Tuning:
    """One way to tune: its name, the same for folders, upstream's flags, and the learning rate."""

    slug: str
    name: str
    flags: dict[str, object]
    learning_rate: float

    @property
    def is_lora(self) -> bool:
        return "lora_enable" in self.flags

    @property
    def frozen_routers(self) -> bool:
        return self.flags.get("mixlora_router_grad") == "none"

    def adapter(self, folder: Path) -> Path:
        """Return the adapter's folder below the folder of its stage. Upstream's loader goes by its name."""
        return folder / f"llava-v1-{self.slug}"


@dataclass(frozen=True)
class Lengths:
    """The length of a training, and its seed."""

    steps: int
    batch: int
    seed: int = SEED


def tuning_stage(name: str, tuning: Tuning, lengths: Lengths, base: Base, data: Done, pictures: Path) -> Stage:
    """Return the stage that tunes the base on `data`'s train.json, with the projector frozen.

    Args:
        pictures: the folder of the training images.
    """
    settings = {**vars(lengths), **tuning.flags, "lr": tuning.learning_rate}

    def work(stage: Context) -> dict[str, Any]:
        output = tuning.adapter(stage.folder)
        samples = data.folder / "train.json"
        stage.run(training_command(tuning, lengths, output, base.model, samples, pictures, base.clip))
        # Frozen routers are in the file and are not trained.
        return {"parameters": scoring.parameters(output, without="router_" if tuning.frozen_routers else None)}

    return Stage(name, settings, (data, base.done), work, (commands, sys.modules[__name__]))


def training_command(
    tuning: Tuning, lengths: Lengths, output: Path, base: Path, samples: Path, pictures: Path, tower: Path
) -> list[str]:
    """Return the command of a tuning. At one seed, all of them see the samples in one order."""
    flags: dict[str, object] = {
        "freeze_mm_mlp_adapter": True,
        "max_steps": lengths.steps,
        "per_device_train_batch_size": lengths.batch,
        "learning_rate": tuning.learning_rate,
        "seed": lengths.seed,
        **tuning.flags,
    }
    return commands.train(output, base, samples, pictures, tower, flags, compared=True)
