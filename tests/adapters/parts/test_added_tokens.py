"""Tokens that training added come back with their ids and their rows (`adapters/parts/added_tokens.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from steered import IMAGE, ids_of, load_llava, pictures, strengthen, words
from tiny_llava import TinyLlava
from torch import Tensor

from llava_steering_plugin import attach, load_adapter, save_adapter
from llava_steering_plugin.adapters.save_load import describe
from llava_steering_plugin.adapters.stored.config import AdapterConfig
from llava_steering_plugin.errors import AdapterError
from llava_steering_plugin.modes.mores import MoReS

ADDED = {"[PAD]": 700, "<im_start>": 701, "<im_end>": 702}


@pytest.fixture
def grown(tiny: TinyLlava, tmp_path: Path) -> tuple[Path, Tensor, Any]:
    """An adapter trained with three tokens more than its base has; its logits on them; its tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.llava, use_fast=False)
    tokenizer.add_tokens(list(ADDED), special_tokens=True)
    model = load_llava(tiny.llava)
    attachment = strengthen(attach(model, MoReS(tokens="all")))
    config = describe(attachment)
    model.resize_token_embeddings(703)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[700:].normal_()
    attachment.config = AdapterConfig(config.mode, config.settings, config.base, "v0", dict(ADDED))
    save_adapter(model, tmp_path / "grown")
    return tmp_path / "grown", spoken(model), tokenizer


def spoken(model: Any) -> Tensor:
    ids = ids_of([1, 701, IMAGE, 702, *words(2)])
    with torch.inference_mode():
        return model(input_ids=ids, images=pictures(1)).logits


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_added_tokens_come_back_with_their_ids_and_their_rows(
    tiny: TinyLlava, grown: tuple[Path, Tensor, Any], with_tokenizer: bool
) -> None:
    from transformers import AutoTokenizer

    folder, expected, trained_tokenizer = grown
    tokenizer = AutoTokenizer.from_pretrained(tiny.llava, use_fast=False) if with_tokenizer else None
    model = load_llava(tiny.llava)
    load_adapter(model, folder, tokenizer)
    assert torch.equal(spoken(model), expected)
    if tokenizer is not None:
        text = "USER: <im_start> red <im_end>"
        assert tokenizer(text).input_ids == trained_tokenizer(text).input_ids
        assert {token: tokenizer.convert_tokens_to_ids(token) for token in ADDED} == ADDED


def test_a_base_whose_vocabulary_was_grown_already_takes_the_rows(
    tiny: TinyLlava, grown: tuple[Path, Tensor, Any]
) -> None:
    folder, expected, tokenizer = grown
    model = load_llava(tiny.llava)
    model.resize_token_embeddings(703)
    load_adapter(model, folder, tokenizer)
    assert torch.equal(spoken(model), expected)


def test_a_tokenizer_with_other_tokens_under_these_ids_is_refused_and_left_alone(
    tiny: TinyLlava, grown: tuple[Path, Tensor, Any]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.llava, use_fast=False)
    tokenizer.add_tokens(["<mine>"])
    model = load_llava(tiny.llava)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"\[PAD\] has id 701, trained as 700") as error:
        load_adapter(model, grown[0], tokenizer)
    assert str(error.value).count("trained as") == 3
    assert len(tokenizer) == 701
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
