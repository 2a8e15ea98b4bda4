"""Gemma, StableLM, Phi-3 and Qwen3 are trained by LLaVA's own train(), in the newest transformers in which it runs.

Covers `components/language_models/newer.py` and `upstream/train/newer_transformers.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from steered import generate, pictures
from tiny_language_models import NEWER, Family
from trained_families import (
    MIXLORA,
    MORES,
    PEFT,
    Trainings,
    check_planned,
    check_resumed,
    check_rows,
    check_trained_and_answers,
    load,
    prompt_of,
)
from training_runs import LORA

by_family = pytest.mark.parametrize("family", NEWER, ids=lambda family: family.name)


@by_family
@pytest.mark.parametrize("flags", [MORES, MIXLORA, PEFT], ids=lambda flags: str(flags["tuning_mode"]))
def test_a_mode_is_trained_loaded_and_answers_as_it_was_trained(
    family: Family, flags: Mapping[str, object], train: Trainings
) -> None:
    check_trained_and_answers(family, train(family, flags), str(flags["tuning_mode"]))


@pytest.mark.parametrize("family", NEWER[::2], ids=lambda family: family.name)
def test_a_lora_of_llavas_own_is_trained_and_loaded(family: Family, train: Trainings) -> None:
    model, tokenizer = load(train(family, LORA), train.bases[family.name])
    assert generate(model, prompt_of(family, tokenizer), pictures(1))


@pytest.mark.parametrize("family", NEWER[-1:], ids=["qwen3"])
def test_a_whole_checkpoint_is_trained_without_a_mode_and_loaded(family: Family, train: Trainings) -> None:
    model, tokenizer = load(train(family, {}))
    assert type(model).__name__ == "LlavaQwen3ForCausalLM"
    assert generate(model, prompt_of(family, tokenizer), pictures(1))


@pytest.mark.parametrize("family", NEWER[-1:], ids=["qwen3"])
def test_a_training_validates_under_the_name_that_the_flag_has_there(family: Family, train: Trainings) -> None:
    validated = {"eval_data_path": train.tiny.data, "eval_strategy": "steps", "eval_steps": 1}
    history = json.loads((train(family, {**MORES, **validated}) / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in history if entry.get("eval_loss", 0) > 0]) == 2


@by_family
def test_a_resumed_training_ends_bit_equal(family: Family, train: Trainings, tmp_path: Path) -> None:
    check_resumed(train, family, MORES, tmp_path / "part")


@by_family
def test_a_plan_counts_from_the_config_what_a_training_trains(family: Family, train: Trainings) -> None:
    check_planned(train, family, MIXLORA)


@by_family
def test_rows_of_a_batch_go_through_adapters_of_their_own(family: Family, train: Trainings, tmp_path: Path) -> None:
    check_rows(family, train(family, MORES), tmp_path)
