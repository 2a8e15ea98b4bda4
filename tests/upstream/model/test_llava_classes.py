"""LLaVAs are made of transformers' own classes; the one made of Llama's is LLaVA's own, to the bit."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from steered import PROMPT, TEXT, generate, ids_of, load_llava, pictures
from tiny_llava import TinyLlava

from llava_steering_plugin.upstream.model.llava_classes import llava_class


@pytest.fixture(scope="module")
def ours(patched_llava: Path) -> Any:
    return llava_class(transformers.LlamaForCausalLM, "llava_smollm2")


def test_one_made_of_llamas_class_does_what_llavas_own_does(ours: Any, tiny: TinyLlava) -> None:
    own = load_llava(tiny.llava)
    made = ours.from_pretrained(tiny.llava, torch_dtype=torch.float32).eval()
    made.get_vision_tower().load_model()
    assert type(made) is not type(own)
    assert made.state_dict().keys() == own.state_dict().keys()

    ids, images = ids_of(PROMPT), pictures(1)
    labels = ids.clamp(min=0)
    theirs, mine = (model(input_ids=ids, images=images, labels=labels) for model in (own, made))
    assert torch.equal(mine.logits, theirs.logits) and torch.equal(mine.loss, theirs.loss)
    for options in ({}, {"num_beams": 2}, {"do_sample": True}):
        assert generate(made, ids, images, **options) == generate(own, ids, images, **options)
    assert generate(made, ids_of(TEXT), None) == generate(own, ids_of(TEXT), None)
    assert not made(input_ids=ids, images=images).logits.isnan().any()


def test_a_decoder_is_built_once(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    original = transformers.LlamaModel.__init__
    monkeypatch.setattr(
        transformers.LlamaModel, "__init__", lambda self, config: built.append(1) or original(self, config)
    )
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = ours(ours.config_class(vocab_size=50, **sizes))
    assert built == [1]
    assert isinstance(model.model, transformers.LlamaModel)
    assert model.get_vision_tower() is None


def test_a_class_is_made_once_and_known_to_transformers_by_its_type(patched_llava: Path) -> None:
    made = llava_class(transformers.PhiForCausalLM, "llava_phi")
    assert made is llava_class(transformers.PhiForCausalLM, "llava_phi")
    config = transformers.AutoConfig.for_model("llava_phi", hidden_size=64, num_hidden_layers=1, vocab_size=9)
    with torch.device("meta"):
        assert type(transformers.AutoModelForCausalLM.from_config(config)) is made
    assert (made.__name__, config.model_type) == ("LlavaPhiForCausalLM", "llava_phi")


def test_where_llava_has_a_class_it_is_that_one(patched_llava: Path) -> None:
    from llava.model import LlavaMistralForCausalLM

    assert llava_class(transformers.MistralForCausalLM, "llava_mistral") is LlavaMistralForCausalLM


def test_the_methods_are_llavas_with_their_signatures(ours: Any) -> None:
    from llava.model import LlavaLlamaForCausalLM

    for name in ("forward", "generate", "prepare_inputs_for_generation"):
        mine, theirs = getattr(ours, name), getattr(LlavaLlamaForCausalLM, name)
        assert inspect.signature(mine) == inspect.signature(theirs)
        assert inspect.unwrap(mine).__code__ is inspect.unwrap(theirs).__code__ or name.startswith("prepare")


def test_rows_of_embeddings_are_added_and_never_cut(ours: Any) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = ours(ours.config_class(vocab_size=50, tie_word_embeddings=True, **sizes))
    for wanted, rows in ((40, 50), (53, 53), (None, 53)):
        model.resize_token_embeddings(wanted)
        assert (model.get_input_embeddings().num_embeddings, model.lm_head.out_features) == (rows, rows)
        assert model.lm_head.weight is model.get_input_embeddings().weight
