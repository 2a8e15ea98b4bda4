"""The comparison of steering ratios: what its table says, and what it reads from an adapter.

test_quick_experiments.py runs the whole program.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from steered import load_llava, strengthen
from tiny_llava import TinyLlava
from transformers import LlamaConfig, LlamaForCausalLM

from llava_steering_plugin import attach, remove_adapter, save_adapter
from llava_steering_plugin.modes.mores import MoReS


@pytest.fixture(scope="module")
def model(tiny: TinyLlava, patched_llava: Any) -> Any:
    return load_llava(tiny.llava)


def test_the_chosen_tokens_are_read_in_the_order_of_the_layers(model: Any, tmp_path: Path) -> None:
    from experiments.ratios.pipeline import chosen

    attachment = strengthen(attach(model, MoReS(tokens="1%,20%,all")))
    with torch.no_grad():
        for number in range(4):
            scores = attachment.parameters()[f"layers.{number}.choices.vis.steer_scores"]
            scores.copy_(torch.eye(3)[min(number, 2)])
    save_adapter(model, tmp_path / "choice")
    remove_adapter(model)
    strengthen(attach(model, MoReS(tokens="5%")))
    save_adapter(model, tmp_path / "fixed")
    remove_adapter(model)
    assert chosen(tmp_path / "choice") == ["1%", "20%", "all", "all"]
    assert chosen(tmp_path / "fixed") == ["5%"] * 4


def test_layer_10_comes_after_layer_2(tmp_path: Path) -> None:
    from experiments.ratios.pipeline import chosen

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=11, vocab_size=16)
    model = LlamaForCausalLM(config)
    attachment = strengthen(attach(model, MoReS(tokens="1%,all")))
    with torch.no_grad():
        attachment.parameters()["layers.2.choices.vis.steer_scores"].copy_(torch.tensor([0.0, 1.0]))
        for number in (0, 1, *range(3, 11)):
            attachment.parameters()[f"layers.{number}.choices.vis.steer_scores"].copy_(torch.tensor([1.0, 0.0]))
    save_adapter(model, tmp_path)
    assert chosen(tmp_path) == ["1%", "1%", "all"] + ["1%"] * 8


def test_the_table_has_mean_and_range_over_seeds_and_every_seeds_choice() -> None:
    from experiments.ratios.pipeline import markdown

    def row(tokens: str, seed: int, share: float, chosen: list[str]) -> dict[str, Any]:
        accuracy = {"colour": share, "shape": 0.5, "yes/no": 0.5}
        return {"tokens": tokens, "seed": seed, "parameters": 4112, "accuracy": accuracy, "chosen": chosen}

    rows = [
        row("all", 1, 0.5, ["all"] * 4),
        row("1%,all", 1, 0.25, ["1%", "all", "all", "1%"]),
        row("1%,all", 2, 0.75, ["all"] * 4),
    ]
    lines = markdown({"rows": rows}).splitlines()
    assert lines[2] == "| `all` | 4,112 | 50.0% | 50.0% | 50.0% |  |"
    assert lines[3].startswith("| `1%,all` | 4,112 | 50.0% (25.0% to 75.0%) | ")
    assert lines[3].endswith("| 1% all all 1%; all all all all |")
