"""What cannot work on transformers' own classes says so in one message: models, prompts and pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from placeholders import IMAGE, KINDS, VISION

from llava_steering_plugin import attach, attachment_of, get_model
from llava_steering_plugin.errors import SteeringError, TokenMapError
from llava_steering_plugin.hooks.scope import current

SMALL: dict[str, Any] = {"vocab_size": 32, "num_layers": 1, "num_heads": 2, "d_model": 16, "d_ff": 16}


def models_that_are_refused() -> dict[str, tuple[torch.nn.Module, str]]:
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
    both = transformers.T5ForConditionalGeneration(transformers.T5Config(**SMALL))
    return {
        "no model": (torch.nn.Linear(2, 2), "Linear has no embeddings of tokens"),
        "a vision tower": (vision, "CLIPVisionModel has no embeddings of tokens"),
        "encoder and decoder": (both, "has an encoder and a decoder"),
    }


def test_a_model_that_can_carry_no_adapter_is_left_as_it_was() -> None:
    for name, (model, message) in models_that_are_refused().items():
        before = set(vars(model))
        for put_on in (attach, get_model):
            with pytest.raises(SteeringError, match=message):
                put_on(model, "mores")  # type: ignore[operator]
        assert set(vars(model)) == before, name


@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_with_too_few_placeholders_is_refused_and_ends_its_scope(name: str) -> None:
    kind = KINDS[name]()
    get_model(kind.model, "mores")
    batch = kind.batch()
    batch["input_ids"][1, batch["input_ids"][1].tolist().index(IMAGE)] = 5
    said = f"hold {2 * kind.features - 1} placeholders for images, and .* another number of features. Take the proc"
    for call in (kind.model, kind.model.generate):
        with pytest.raises(TokenMapError, match=said):
            call(**batch)
    assert current() is None
    assert attachment_of(kind.model) is not None
    kind.model(**kind.batch())


def test_a_video_is_refused_where_images_alone_are_known() -> None:
    kind = KINDS["Llava"]()
    get_model(kind.model, "mores")
    with pytest.raises(TokenMapError, match=r"names no token for frames of a video.*Give the frames as images"):
        kind.model(**kind.batch(), pixel_values_videos=torch.zeros(1, 2, 3, 8, 8))
