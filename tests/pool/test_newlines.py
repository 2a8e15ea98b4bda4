"""Rows of one batch end the lines of their tiles as their own adapters do (`pool/newlines.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from own_parts import ROW, ask, base, equal, save
from steered import ids_of, pictures
from tiny_llava import TinyLlava

from llava_steering_plugin import AdapterPool, load_adapter, remove

BASE = "__base__"
SIZES = {"images": [pictures(3, seed) for seed in range(3)], "image_sizes": [(112, 56), (56, 112), (100, 56)]}


def logits(model: Any, **named: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids_of(ROW, ROW, ROW), **SIZES, **named).logits
    return found


def test_an_adapter_with_its_own_newline_shares_a_model_with_others(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path
) -> None:
    model = base(tiny, "newline")
    names = ["one", BASE, "other"]
    folders = {name: save(tiny, "newline", tmp_path / name, seed) for seed, name in enumerate(("one", "other"))}
    alone, answers = {BASE: logits(model)}, {BASE: ask(model, "newline")}
    for name, folder in folders.items():
        load_adapter(model, folder)
        alone[name], answers[name] = logits(model), ask(model, "newline")
        remove(model)
    pool = AdapterPool(model)
    for name, folder in folders.items():
        pool.load(name, folder)
    for name in names:
        assert torch.equal(logits(model, adapter_names=name), alone[name])
    together = logits(model, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(together[row], alone[name][row], rtol=1e-5, atol=1e-4)
        assert row == 1 or not torch.allclose(together[row], alone[BASE][row], atol=1e-2)
    assert equal(ask(model, "newline"), answers[BASE])
    size = sum(value.numel() for value in model.get_model().mm_projector.parameters()) + 64
    assert pool.details("one").parameters == size + 4 * (2 * 64 * 2 + 2)
