"""Describe ways to tune the base by a name, LLaVA's flags and the learning rates that are tried."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """One way to tune.

    Attributes:
        slug: its name in folders and in `llava-steering diagnose`.
        name: its name in tables and plots.
        flags: LLaVA's, as `llava-steering compare` takes them.
        rates: the learning rates of which validation chooses one.
    """

    slug: str
    name: str
    flags: dict[str, object]
    rates: tuple[float, ...]

    @property
    def is_mixlora(self) -> bool:
        return self.flags.get("tuning_mode") == "mixlora"


def lora(slug: str, name: str, rank: int, alpha: int, rates: tuple[float, ...], dropout: float = 0.0) -> Tuning:
    """Return PEFT's LoRA on all linears of the decoder, through the same trainer as the modes."""
    config = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
    return Tuning(slug, name, {"tuning_mode": "peft", "peft_method": "lora", "peft_config": config}, rates)
