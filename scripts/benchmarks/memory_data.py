"""Write the random LLaVA of the memory benchmark, and its training data."""

from __future__ import annotations

import json
from pathlib import Path

from .shared.random_llava import WORDS, Shape, save, save_tokenizer

# About 100 million parameters.
SHAPE = Shape(
    "100m",
    width=768,
    inner=2048,
    layers=8,
    heads=12,
    vocabulary=32_000,
    tower_width=128,
    tower_inner=512,
    tower_layers=3,
    tower_heads=2,
    side=224,
    patch=14,
)


def write_data(folder: Path) -> None:
    """Write the LLaVA, its tower, a tokenizer, one picture and long conversations into `folder`."""
    from PIL import Image

    model = folder / "llava-random"
    model.mkdir()
    save_tokenizer(model)
    save(SHAPE, model, folder / "tower")
    Image.new("RGB", (SHAPE.side, SHAPE.side), (90, 120, 30)).save(folder / "picture.png")
    turns = [
        {"from": "human", "value": "<image>\n" + WORDS[0]},
        {"from": "gpt", "value": " ".join(WORDS * 40)},  # longer than any row, so that all rows are full
    ]
    samples = [{"id": str(number), "image": "picture.png", "conversations": turns} for number in range(16)]
    (folder / "data.json").write_text(json.dumps(samples), encoding="utf-8")
