"""Define sizes and lengths of the demo: the full run, and the quick run for CI."""

from __future__ import annotations

from dataclasses import dataclass, replace

from experiments.settings import FULL_BASE, QUICK_BASE, BaseSettings
from experiments.tuning import Tuning, lora


def _mores(rank: int, tokens: str) -> Tuning:
    slug = f"mores-rank-{rank}-{tokens.replace('+', '-')}"
    flags: dict[str, object] = {"tuning_mode": "mores", "mores_rank": rank, "mores_tokens": tokens}
    return Tuning(slug, f"MoReS rank {rank}, {tokens}", flags, (7e-3, 2e-2))


# The demo is about the first one; the others stand beside it.
MAIN = _mores(4, "all")
LORA = lora("lora-r-8", "LoRA r=8", 8, 16, (1e-3, 3e-3), dropout=0.05)
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
        validation: questions that choose learning rates, on other pictures.
        tunings: the ways to teach the shifted camera, in order.
        diagnosed: of these, by their slugs, the ones whose attention is measured beside the base's.
        diagnosis: questions for that.
    """

    base: BaseSettings = FULL_BASE
    shift_steps: int = 500
    questions: int = 900
    validation: int = 300
    tunings: tuple[Tuning, ...] = (MAIN, *BESIDE)
    diagnosed: tuple[str, ...] = (MAIN.slug, LORA.slug)
    diagnosis: int = 150


FULL = Settings()
# Long enough to run every part, too short to learn much: it shows that the parts fit together, not that they are good.
QUICK = Settings(
    QUICK_BASE,
    shift_steps=10,
    questions=30,
    validation=6,
    tunings=(replace(MAIN, rates=MAIN.rates[-1:]),),
    diagnosed=(MAIN.slug,),
    diagnosis=6,
)
