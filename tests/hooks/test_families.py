"""A model's family is found by what the model has; what belongs to none is refused, by the name of its class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from routed import small_llama
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from llava_steering_plugin import attach
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.hooks.families import Family, Placeholder, family_of, placeholder_tokens, text_config

pytest_plugins = ["steered_fixtures"]
IMAGE, VIDEO = 60, 61


class Described(PretrainedConfig):
    """A config of several parts, as transformers 5 has them."""

    def get_text_config(self, decoder: bool = False) -> Any:
        assert decoder
        return self.text_config


class Seeing(nn.Module):
    """Some of a model of transformers' own: what its family is found by."""

    def __init__(self, **config: Any):
        super().__init__()
        self.inner = small_llama()
        self.multi_modal_projector = nn.Linear(2, 2)
        self.config = Described(text_config=self.inner.config, **config)

    def get_decoder(self) -> nn.Module:
        stack: nn.Module = self.inner.model
        return stack

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.inner.lm_head
        return head

    def forward(
        self, input_ids: Tensor, pixel_values: Any = None, attention_mask: Any = None, labels: Any = None
    ) -> None: ...


def test_llava_is_spliced_and_a_plain_language_model_is_told(model: Any) -> None:
    spliced, told = family_of(model), family_of(small_llama())
    assert (spliced.name, spliced.splices) == ("spliced", True) and (told.name, told.splices) == ("told", False)
    assert spliced.text_config is model.config and spliced.decoder() is model.model
    assert spliced.projector() == ("model.mm_projector", model.model.mm_projector)
    assert told.projector() is None and told.tokens((torch.ones(1, 3),), {}) is None
    assert spliced.canonical("model.mm_projector.0.weight") == "model.mm_projector.0.weight"


@pytest.mark.parametrize("name", ["image_token_id", "image_token_index"])
def test_placeholders_that_are_attended_are_visual_and_the_prompt_ends_at_the_first_label(name: str) -> None:
    model: Any = Seeing(**{name: IMAGE, "video_token_id": VIDEO})
    family = family_of(model)
    assert isinstance(family, Placeholder) and placeholder_tokens(model.config) == [IMAGE, VIDEO]
    assert family.text_config is model.inner.config and family.decoder() is model.inner.model
    assert family.projector() == ("multi_modal_projector", model.multi_modal_projector)
    ids = torch.tensor([[IMAGE, IMAGE, 5, VIDEO, 6, 7]])
    attention = torch.tensor([[0, 1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, -100, -100, 6, -100]])
    for args, kwargs in (
        ((ids, None, attention, labels), {}),
        ((ids,), {"attention_mask": attention, "labels": labels}),
    ):
        tokens = family.tokens(args, kwargs)
        assert tokens is not None
        assert tokens.visual.tolist() == [[False, True, False, True, False, False]]
        assert tokens.attention.tolist() == attention.bool().tolist()
        assert tokens.prompt.tolist() == [[False, True, True, True, False, False]]
    whole = family.tokens((ids,), {})
    assert whole is not None and bool(whole.attention.all()) and bool(whole.prompt.all()) and bool(whole.visual[0, 0])
    assert family.tokens((), {"inputs_embeds": torch.zeros(1, 6, 32), "attention_mask": attention}) is None


def test_parameters_have_llavas_names_in_files_and_their_own_in_the_model() -> None:
    model: Any = Seeing(image_token_id=IMAGE)
    model.inner.image_newline = nn.Parameter(torch.zeros(2))
    family = family_of(model)
    for ours, theirs in (
        ("multi_modal_projector.linear_1.weight", "model.mm_projector.0.weight"),
        ("multi_modal_projector.linear_2.bias", "model.mm_projector.2.bias"),
        ("multi_modal_projector.norm.weight", "model.mm_projector.norm.weight"),
        ("inner.image_newline", "model.image_newline"),
        ("inner.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("inner.lm_head.weight", "lm_head.weight"),
        ("elsewhere.weight", "elsewhere.weight"),
    ):
        assert family.canonical(ours) == theirs and family.local(theirs) == ours


def test_images_beside_the_tokens_are_no_placeholders() -> None:
    model: Any = Seeing(image_token_index=IMAGE)
    model.inner.config.cross_attention_layers = [1]
    assert type(family_of(model)) is Family


def test_a_config_that_cannot_be_asked_is_the_language_models_own() -> None:
    config = LlamaConfig()
    assert text_config(config) is config


@pytest.mark.skipif(
    not hasattr(LlavaForConditionalGeneration, "_merge_input_ids_with_image_features"),
    reason="this transformers lays out no images inside forward",
)
def test_a_class_that_lays_out_images_inside_its_forward_is_refused_by_name() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    old = LlavaForConditionalGeneration(
        LlavaConfig(vision, LlamaConfig(**sizes, vocab_size=64), image_token_index=IMAGE)
    )
    with pytest.raises(SteeringError, match=r"LlavaForConditionalGeneration of transformers 4\..* Use transformers 5"):
        attach(old, "mores", rank=1)


def test_a_model_with_an_encoder_is_refused() -> None:
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=8)
    with pytest.raises(SteeringError, match="T5ForConditionalGeneration has an encoder and a decoder"):
        attach(T5ForConditionalGeneration(config), "mores", rank=1)
