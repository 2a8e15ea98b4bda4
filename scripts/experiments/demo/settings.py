"""Define sizes and lengths of the demo: the full run, and the quick run for CI."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.settings import FULL_BASE, QUICK_BASE, BaseSettings
from experiments.tuning import Tuning


def _mores(rank: int, tokens: str) -> Tuning:
    slug = f"mores-rank-{rank}-{tokens.replace('+', '-')}"
    flags: dict[str, object] = {"tuning_mode": "mores", "mores_rank": rank, "mores_tokens": tokens}
    return Tuning(slug, f"MoReS rank {rank}, {tokens}", flags, 2e-2)


# The demo is about the first one; the others stand beside it.
MAIN = _mores(4, "all")
LORA = Tuning("lora-r-8", "LoRA r=8", {"lora_enable": True, "lora_r": 8, "lora_alpha": 16}, 1e-3)
BESIDE = (
    _mores(1, "all"),
    _mores(4, "uniform9"),
    _mores(4, "f4+l5"),
    LORA,
)


@dataclass(frozen=True)
class Settings:
    """Sizes and lengths of a run.

    Attributes:
        base: of the base.
        shift_steps: training steps on the shifted camera.
        questions: test questions, a third of each kind.
        tunings: the ways to teach the shifted camera, in order.
        diagnosed: of these, the ones whose attention is measured beside the base's.
        diagnosis: questions for that.
    """

    base: BaseSettings = FULL_BASE
    shift_steps: int = 500
    questions: int = 900
    tunings: tuple[Tuning, ...] = (MAIN, *BESIDE)
    diagnosed: tuple[Tuning, ...] = (MAIN, LORA)
    diagnosis: int = 150


FULL = Settings()
# Long enough to run every part, too short to learn much: it shows that the parts fit together, not that they are good.
QUICK = Settings(QUICK_BASE, shift_steps=20, questions=30, tunings=(MAIN,), diagnosed=(MAIN,), diagnosis=6)
