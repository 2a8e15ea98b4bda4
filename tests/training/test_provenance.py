"""An adapter knows its base by rows that every loader keeps (`training/provenance.py`)."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tiny_llava import TinyLlava
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llava_steering_plugin import attach, load_adapter, remove_adapter, save_adapter
from llava_steering_plugin.adapters.save_load import FINGERPRINT
from llava_steering_plugin.adapters.stored.folder import AdapterFolder
from llava_steering_plugin.training.provenance import record

PRECISION = Namespace(fp16=False, bf16=False, bits=16)


@pytest.mark.parametrize("padding", [0, 68])
def test_rows_without_a_token_may_be_cut_off(tiny: TinyLlava, tmp_path: Path, padding: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.llm, use_fast=False)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + padding, **sizes))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    model.config._name_or_path = str(tmp_path / "base")
    tokenizer.add_tokens(["<im_start>"])
    attachment = attach(model, "mores", rank=1)
    record(attachment, PRECISION, None, tokenizer, ())
    assert attachment.config is not None
    assert attachment.config.base.vocab_size == len(tokenizer) - 1
    assert attachment.config.added_tokens == {"<im_start>": len(tokenizer) - 1}
    if not padding:  # the row of the added token is not there yet, and a training would make it
        model.resize_token_embeddings(len(tokenizer))
    save_adapter(model, tmp_path / "adapter")
    ids = AdapterFolder(tmp_path / "adapter").read().tensors[FINGERPRINT + "ids"]
    assert int(ids.max()) == len(tokenizer) - 2 and torch.equal(ids, ids.sort().values)
    remove_adapter(model)

    other = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    other.resize_token_embeddings(len(tokenizer))  # as LLaVA-NeXT's loader does
    load_adapter(other, tmp_path / "adapter")
