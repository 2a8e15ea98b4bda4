"""The conversion of SmolLM2: the order of its weights, its tokenizer, and what it says where it cannot start.

The whole conversion needs a package of 98 MB and gguf: `scripts/README.md` says how it is run, and it checks itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language_models import SMOLLM2
from tiny_llava import TinyLlava
from transformers import AutoTokenizer
from transformers.models.llama.modeling_llama import rotate_half

SCRIPT = Path(__file__).parents[2] / "scripts" / "experiments" / "smollm2.py"


@pytest.fixture(scope="module")
def program() -> Any:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import smollm2
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return smollm2


def test_pairs_of_features_are_turned_alike_in_both_orders(program: Any) -> None:
    heads, width, turn = 3, 8, torch.tensor(0.7)
    values = torch.randn(heads * width, 5)
    neighbours = torch.stack([-values[1::2], values[0::2]], 1).flatten(0, 1)  # as llama.cpp turns
    expected = program.in_transformers_order(values * turn.cos() + neighbours * turn.sin(), heads)
    ordered = program.in_transformers_order(values, heads)
    turned = rotate_half(ordered.unflatten(0, (heads, width)).transpose(1, 2)).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(ordered * turn.cos() + turned * turn.sin(), expected)


def test_a_tokenizer_is_rebuilt_from_tokens_and_merges(program: Any, language_model: Path, tmp_path: Path) -> None:
    original = AutoTokenizer.from_pretrained(language_model, use_fast=False)
    vocabulary = original.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {"bos": "<|im_start|>", "eos": "<|im_end|>", "unknown": "<|endoftext|>", "padding": "<|im_end|>"}
    fields = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": (language_model / "merges.txt").read_text().splitlines()[1:],
        "tokenizer.ggml.token_type": [3 if token in special.values() else 1 for token in tokens],
        "tokenizer.chat_template": SMOLLM2,
        **{f"tokenizer.ggml.{name}_token_id": vocabulary[token] for name, token in special.items()},
    }
    program._tokenizer(fields, tmp_path).save_pretrained(tmp_path)
    text = "<|im_start|>user\nIt is red.\n\nTwo<|im_end|>\n"
    for fast in (False, True):
        made = AutoTokenizer.from_pretrained(tmp_path, use_fast=fast)
        assert made(text).input_ids == original(text).input_ids
        assert made.chat_template == SMOLLM2
        assert (made.pad_token, made.eos_token, made.bos_token) == ("<|im_end|>", "<|im_end|>", "<|im_start|>")
    assert json.loads((tmp_path / "vocab.json").read_text()) == vocabulary


@pytest.fixture(scope="module")
def language_model(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_language_models import FAMILIES, build

    return build(FAMILIES[2], tiny, tmp_path_factory.mktemp("smollm2") / "base")


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{tmp_path} is there already" in done.stderr
    assert list(tmp_path.iterdir()) == []
