"""Define the parts that are tuned together, and the lengths of the comparison."""

from __future__ import annotations

from experiments.camera import Settings
from experiments.settings import QUICK_BASE
from experiments.tuning import Tuning, lora

# One rate goes to both parts of a joint mode. MoReS alone does best at the last (the demo), LoRA and MixLoRA at the
# first (docs/multitask.md), and every method tries all three.
RATES = (2e-3, 7e-3, 2e-2)

MORES = Tuning("mores", "MoReS", {"tuning_mode": "mores", "mores_rank": 4, "mores_tokens": "all"}, RATES)
LORA = lora("lora", "LoRA", 8, 16, RATES)
MIXLORA = Tuning("mixlora", "MixLoRA", {"tuning_mode": "mixlora", "mixlora_factors": 8, "mixlora_rank": 2}, RATES)


def together(first: Tuning, second: Tuning) -> Tuning:
    """Return both tunings at once, with the flags that each has alone."""
    modes = f"{first.flags['tuning_mode']}+{second.flags['tuning_mode']}"
    flags = {**first.flags, **second.flags, "tuning_mode": modes}
    return Tuning(f"{first.slug}-{second.slug}", f"{first.name} + {second.name}", flags, first.rates)


TUNINGS = (LORA, MORES, together(MORES, LORA), MIXLORA, together(MORES, MIXLORA))

FULL = Settings(TUNINGS)
# Long enough to run every part, too short to learn much.
QUICK = Settings((MORES, together(MORES, LORA)), QUICK_BASE, steps=4, seeds=(1,), questions=6, validation=6)
