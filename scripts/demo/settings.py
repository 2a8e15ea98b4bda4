"""What the demo does, in numbers: the full run and the quick one that CI makes."""

from __future__ import annotations

from dataclasses import dataclass, field

# Channel order of the shifted camera: its red comes out where green was, green where blue was, blue where red was.
CAMERA = (2, 0, 1)
SEED = 7
IMAGE_SIDE, PATCH = 64, 8
VISUAL_TOKENS = (IMAGE_SIDE // PATCH) ** 2
# Questions about one picture that share a conversation in training: the picture is then read and encoded once for all.
TURNS = 3


@dataclass(frozen=True)
class Tuning:
    """One way to teach the shifted camera: a name, upstream's flags for it, and what it trains."""

    name: str
    flags: dict[str, object]
    learning_rate: float


def _mores(rank: int, tokens: str) -> Tuning:
    flags: dict[str, object] = {"tuning_mode": "mores", "mores_rank": rank, "mores_tokens": tokens}
    return Tuning(f"MoReS rank {rank}, {tokens}", flags, 2e-2)


# The first is what the demo is about; the others stand beside it.
MAIN = _mores(4, "all")
BESIDE = (
    _mores(1, "all"),
    _mores(4, "uniform9"),
    _mores(4, "f4+l5"),
    Tuning("LoRA r=8", {"lora_enable": True, "lora_r": 8, "lora_alpha": 16}, 1e-3),
)


@dataclass(frozen=True)
class Settings:
    """Sizes and lengths of a run.

    Attributes:
        tower_epochs: passes of the vision tower over its training images.
        projector_steps, tuning_steps: upstream's stage 1 and stage 2, of `batch` conversations each.
        shift_steps: steps that teach the shifted camera.
        questions: test questions, a third of each type.
        tunings: the ways to teach the shifted camera, in order.
    """

    tower_epochs: int = 20
    projector_steps: int = 100
    tuning_steps: int = 600
    shift_steps: int = 500
    batch: int = 16
    questions: int = 900
    tunings: tuple[Tuning, ...] = field(default=(MAIN, *BESIDE))


FULL = Settings()
# Long enough to run everything, too short to learn much: it shows that the parts fit, not that they are good.
QUICK = Settings(tower_epochs=2, projector_steps=10, tuning_steps=40, shift_steps=20, questions=30, tunings=(MAIN,))
