"""Define sizes and lengths of the base that all experiments start from."""

from __future__ import annotations

from dataclasses import dataclass

# Channel order of the shifted camera: red appears where green was, green where blue was, blue where red was.
CAMERA = (2, 0, 1)
SEED = 7
IMAGE_SIDE, PATCH = 64, 8
# Questions about one picture that share a conversation in training: the picture is read and encoded once for all.
TURNS = 3


@dataclass(frozen=True)
class BaseSettings:
    """Lengths of the trainings that make the base.

    Attributes:
        tower_epochs: passes of the vision tower over its training images.
        projector_steps, tuning_steps: steps of upstream's stage 1 and stage 2, of `batch` conversations each.
    """

    tower_epochs: int = 20
    projector_steps: int = 100
    tuning_steps: int = 600
    batch: int = 16


FULL_BASE = BaseSettings()
# Long enough to run every part, too short to learn much.
QUICK_BASE = BaseSettings(tower_epochs=1, projector_steps=5, tuning_steps=20)
