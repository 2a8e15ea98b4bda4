"""Trainings in which layers learn which tokens they steer: resumed to the bit, watched, logged, and over 4 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from quantising import quantising_on_cpu
from rank_runs import assert_equal
from tiny_llava import HIDDEN, LAYERS, TinyLlava
from training_runs import train_flags, train_in_process

from llava_steering_plugin.adapters.stored.folder import ADAPTER
from llava_steering_plugin.adapters.stored.locate import read

CHOICE: dict[str, object] = {
    "tuning_mode": "mores",
    "mores_rank": 2,
    "mores_tokens": "f1,uniform4,all",
    "mores_dropout": 0.1,
    "freeze_mm_mlp_adapter": True,
    # More than the ten steps after which a parameter without a gradient stops the training.
    "max_steps": 12,
    "save_strategy": "steps",
    "save_steps": 5,
}


@pytest.fixture(scope="module")
def whole(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("choice") / "run"
    train_in_process(train_flags(tiny, output, CHOICE))
    return output


def test_every_score_learns_but_those_of_the_last_layer_which_no_answer_reads(whole: Path) -> None:
    stored = read(whole).section(ADAPTER)
    scores = {name: value for name, value in stored.items() if name.endswith("steer_scores")}
    assert sum(value.numel() for value in stored.values()) == LAYERS * (2 * HIDDEN * 2 + 2 + 3)
    assert [bool(value.any()) for value in scores.values()] == [True] * (LAYERS - 1) + [False]


def test_the_log_says_how_many_layers_are_at_each_selection(whole: Path) -> None:
    history = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    specs = str(CHOICE["mores_tokens"]).split(",")
    counts = [[entry[f"mores_vis_layers_at_{spec}"] for spec in specs] for entry in history if "loss" in entry]
    assert len(counts) == CHOICE["max_steps"] and all(sum(each) == LAYERS for each in counts)
    assert counts[0] == [LAYERS, 0, 0], "a training begins with the first selection"


@pytest.mark.parametrize("step", [5, 10])
def test_a_resumed_training_ends_bit_equal(tiny: TinyLlava, whole: Path, tmp_path: Path, step: int) -> None:
    shutil.copytree(whole / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    torch.manual_seed(1234)
    train_in_process(train_flags(tiny, tmp_path / "run", CHOICE))
    assert_equal(whole, tmp_path / "run")


def test_scores_learn_over_a_base_in_4_bits(tiny: TinyLlava, patched_llava: Path, tmp_path: Path) -> None:
    with quantising_on_cpu():
        train_in_process(train_flags(tiny, tmp_path / "run", {**CHOICE, "bits": 4, "save_strategy": "no"}))
    assert read(tmp_path / "run").section(ADAPTER)["layers.0.choices.vis.steer_scores"].any()
