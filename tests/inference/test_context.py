"""The length of a prompt is what LLaVA's splice makes of it, for every layout of images, and so is its limit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from steered import IMAGE

from llava_steering_plugin.inference.context import Context, PromptTokens
from llava_steering_plugin.inference.images import image_arguments

pytest_plugins = ["pooled_fixtures", "steered_fixtures"]

SIZES = [(56, 56), (120, 56), (56, 120), (301, 40), (64, 90)]


@pytest.mark.parametrize("layout", ["pad", "flat", "spatial", "spatial_unpad", "cls_patch"])
def test_an_image_counts_as_many_tokens_as_llava_makes_of_it(
    shared: Any, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(shared.config.mm_vision_tower)
    if layout == "cls_patch":
        monkeypatch.setattr(shared.config, "mm_vision_select_feature", layout)
        monkeypatch.setattr(shared.get_vision_tower(), "select_feature", layout)
    elif layout != "pad":
        monkeypatch.setattr(shared.config, "image_aspect_ratio", "anyres")
        monkeypatch.setattr(shared.config, "mm_patch_merge_type", layout, raising=False)
        grid = [[56, 112], [112, 56], [112, 112]]
        monkeypatch.setattr(shared.config, "image_grid_pinpoints", grid, raising=False)
        monkeypatch.setattr(shared.model, "image_newline", torch.zeros(64).half(), raising=False)
    counted = set()
    for size in SIZES:
        ids = [1, 300, IMAGE, 301, 302]
        images = image_arguments([Image.new("RGB", size)], processor, shared)
        images["images"] = [each.to(shared.dtype) for each in images["images"]]
        if layout == "pad" or layout == "cls_patch":
            images["images"] = torch.stack(images["images"])
        spliced = shared.prepare_inputs_labels_for_multimodal(torch.tensor([ids]), None, None, None, None, **images)
        counted.add(PromptTokens.of_model(shared).count(ids, [size]))
        assert PromptTokens.of_model(shared).count(ids, [size]) == spliced[4].shape[1], size
    assert (len(counted) > 1) == (layout in ("flat", "spatial", "spatial_unpad"))


@pytest.mark.parametrize(
    ("config", "text", "images"),
    [
        ({"max_position_embeddings": 4096, "tokenizer_model_max_length": 2048}, 4095, 2048),
        ({"max_position_embeddings": 2048, "tokenizer_model_max_length": 4096}, 2047, 2047),
        ({"max_position_embeddings": 2048, "tokenizer_model_max_length": None}, 2047, 2047),
        ({"max_seq_len": 512}, 511, 511),
        ({}, None, None),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16383, 16383),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131071, 131071),
    ],
)
def test_a_prompt_may_be_as_long_as_the_model_sees_all_of_it(
    config: dict[str, Any], text: int | None, images: int | None
) -> None:
    context = Context.of(SimpleNamespace(**config))
    assert (context.prompt(False), context.prompt(True)) == (text, images)
