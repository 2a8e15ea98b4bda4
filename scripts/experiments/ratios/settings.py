"""Define which selections of tokens are compared, and the lengths of the comparison."""

from __future__ import annotations

from experiments.camera import Settings
from experiments.settings import QUICK_BASE
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

FULL = Settings((*FIXED, *CHOICES), validation=90)  # there is one learning rate, so validation chooses nothing
# Long enough to run every part, too short to learn much.
QUICK = Settings((FIXED[0], CHOICES[0]), QUICK_BASE, steps=10, seeds=(1,), questions=30, validation=6)
