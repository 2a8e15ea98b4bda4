"""Define the sizes of the GPU check: the model, and the work that is done with it."""

from __future__ import annotations

from dataclasses import dataclass

from .shared.random_llava import Shape


@dataclass(frozen=True)
class Size(Shape):
    """A random LLaVA, and the work that is done with it.

    Attributes:
        batch, text: samples of a training step, and their tokens besides the image.
        warmup, steps: training steps before and during the measurement.
        rounds, tokens: generations, and the tokens of each.
        ranks: ranks of PEFT's LoRA.
    """

    batch: int
    text: int
    warmup: int
    steps: int
    rounds: int
    tokens: int
    ranks: tuple[int, ...] = (8, 128)


LLAVA_7B = Size(
    "llava-1.5-7b",
    width=4096,
    inner=11008,
    layers=32,
    heads=32,
    vocabulary=32000,
    tower_width=1024,
    tower_inner=4096,
    tower_layers=24,
    tower_heads=16,
    side=336,
    patch=14,
    batch=4,
    text=128,
    warmup=2,
    steps=8,
    rounds=3,
    tokens=64,
)
TINY = Size(
    "tiny",
    width=64,
    inner=128,
    layers=2,
    heads=4,
    vocabulary=300,
    tower_width=64,
    tower_inner=128,
    tower_layers=2,
    tower_heads=4,
    side=28,
    patch=14,
    batch=2,
    text=12,
    warmup=1,
    steps=2,
    rounds=1,
    tokens=4,
)
