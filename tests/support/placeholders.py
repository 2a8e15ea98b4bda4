"""Tiny models of transformers' own classes with random weights, and a batch for each: rows of unequal length.

Their prompts hold a placeholder token for every image feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IMAGE, VIDEO, PAD = 60, 61, 0
IGNORED = -100
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Kind:
    """A tiny model and what it is called on.

    Attributes:
        model: in eval mode and float32.
        features: how many placeholders stand for an image.
        images: the arguments of a call that hold `count` images.
    """

    model: Any
    features: int
    pixels: Any

    def images(self, count: int) -> dict[str, Tensor]:
        torch.manual_seed(3)
        found: dict[str, Tensor] = self.pixels(count)
        return found

    def batch(self, side: str = "left") -> dict[str, Tensor]:
        """A short row and a long one with an image each, padded on `side`; and which tokens are there."""
        rows = [[5, *[IMAGE] * self.features, 9, 8], [4, 7, *[IMAGE] * self.features, 3, 2, 9, 17, 30]]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), PAD)
        attention = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            place = slice(longest - len(row), None) if side == "left" else slice(len(row))
            ids[number, place], attention[number, place] = torch.tensor(row), 1
        return {"input_ids": ids, "attention_mask": attention} | self.images(len(rows))


def visual(batch: dict[str, Tensor]) -> Tensor:
    """Where the image features are, worked out without the package."""
    return (batch["input_ids"] == IMAGE) | (batch["input_ids"] == VIDEO)


def labelled(batch: dict[str, Tensor], answer: int = 2) -> dict[str, Tensor]:
    """The batch with the last tokens of each row as what is to be learned."""
    labels = torch.full_like(batch["input_ids"], IGNORED)
    labels[:, -answer:] = batch["input_ids"][:, -answer:]
    return batch | {"labels": labels}


def llava() -> Kind:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE
    )
    return Kind(_made(LlavaForConditionalGeneration, config), 4, lambda n: {"pixel_values": torch.randn(n, 3, 8, 8)})


def llava_next() -> Kind:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[8, 16], [16, 8]],
    )
    return Kind(_made(LlavaNextForConditionalGeneration, config), 14, _tiles)


def llava_onevision() -> Kind:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[8, 16], [16, 8]],
    )
    return Kind(_made(LlavaOnevisionForConditionalGeneration, config), 14, _tiles)


def qwen2_5_vl() -> Kind:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    return Kind(_made(Qwen2_5_VLForConditionalGeneration, config), 4, _patches)


KINDS = {"Llava": llava, "LlavaNext": llava_next, "LlavaOnevision": llava_onevision, "Qwen2.5-VL": qwen2_5_vl}


def _tiles(count: int) -> dict[str, Tensor]:
    """Images of 8 x 16 pixels: the whole one, shrunk, and two tiles, each of 2 x 2 patches, with a newline a line."""
    return {"pixel_values": torch.randn(count, 3, 3, 8, 8), "image_sizes": torch.tensor([[8, 16]] * count)}


def _patches(count: int) -> dict[str, Tensor]:
    """Images of 4 x 4 patches, four of which become one feature."""
    return {
        "pixel_values": torch.randn(count * 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * count),
    }


def _made(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config).eval()
