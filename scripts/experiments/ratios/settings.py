"""Define which selections of tokens are compared, and the lengths of the comparison."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.settings import FULL_BASE, QUICK_BASE, BaseSettings
from experiments.tuning import Tuning

# Of the 64 tokens of an image: 1, 3, 13 and all.
SHARES = ("1%", "5%", "20%", "all")
RANK, LEARNING_RATE = 4, 2e-2  # the demo's


def tuning(tokens: str) -> Tuning:
    """Return MoReS on these tokens, as the demo tunes it."""
    slug = f"ratio-{tokens.replace('%', '').replace(',', '-')}"
    flags: dict[str, object] = {"tuning_mode": "mores", "mores_rank": RANK, "mores_tokens": tokens}
    return Tuning(slug, tokens, flags, (LEARNING_RATE,))


# A choice begins with the first selection: once from the fewest tokens, and once from all.
FIXED = tuple(tuning(share) for share in SHARES)
CHOICES = tuple(tuning(",".join(shares)) for shares in (SHARES, SHARES[::-1]))


@dataclass(frozen=True)
class Settings:
    """Lengths of a run.

    Attributes:
        base: of the base, the demo's.
        steps: of each tuning on the shifted camera.
        seeds: of the tunings, each of which is run with every seed.
        questions: test questions, a third of each kind.
        validation: the same on other pictures; there is one learning rate, so they choose nothing.
        tunings: that are compared.
    """

    base: BaseSettings = FULL_BASE
    steps: int = 500
    seeds: tuple[int, ...] = (1, 2, 3)
    questions: int = 900
    validation: int = 90
    tunings: tuple[Tuning, ...] = (*FIXED, *CHOICES)


FULL = Settings()
# Long enough to run every part, too short to learn much.
QUICK = Settings(QUICK_BASE, steps=20, seeds=(1,), questions=30, validation=6, tunings=(FIXED[0], CHOICES[0]))
