"""What a base is, from its config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llava_steering_plugin.adapters.fit.base_model import language_model, read_config
from llava_steering_plugin.errors import SteeringError

SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json. Give the folder of a model"),
        ("{", "cannot be read"),
        ("[]", "holds no settings"),
        ("{}", "names no model_type"),
        ('{"model_type": 5}', "names no model_type"),
    ],
)
def test_a_folder_that_describes_no_model_is_refused_with_the_reason(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(SteeringError, match=message) as error:
        read_config(str(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_what_is_neither_a_folder_nor_on_the_hub_is_refused() -> None:
    with pytest.raises(SteeringError, match="there is no folder nobody/here, and no model of that name"):
        read_config("nobody/here")


@pytest.mark.parametrize(
    "described",
    [
        {"model_type": "llama", **SIZES},
        {"model_type": "llava_llama", "mm_vision_tower": "somewhere", **SIZES},
        {"model_type": "llava", **SIZES},
        {"model_type": "llava", "text_config": SIZES},
        {"model_type": "llava_next", "text_config": {"model_type": "llama", **SIZES}},
    ],
    ids=["plain", "llava_llama", "the first LLaVAs", "of transformers", "of transformers, with its type"],
)
def test_the_language_model_is_built_without_memory_whatever_llava_is_around_it(
    tmp_path: Path, described: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(described))
    model = language_model(read_config(str(tmp_path)), str(tmp_path))
    real = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert {name: value.shape for name, value in model.named_parameters()} == {
        name: value.shape for name, value in real.named_parameters()
    }
    assert {value.device for value in model.parameters()} == {torch.device("meta")}


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"model_type": "llava_abacus"}, "know no language model 'abacus'"),
        ({"model_type": "llama", **SIZES, "hidden_size": "wide"}, "describes no model that can be built"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(described: dict[str, Any], message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        language_model(described, "here")
