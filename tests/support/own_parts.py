"""Adapters that bring parts of their own for every part of a LLaVA that one can bring, and questions that show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from steered import IMAGE, ids_of, load_llava, pictures, strengthen, words
from tiny_llava import IMAGE_SIDE, TinyLlava
from torch import Tensor

from llava_steering_plugin import attach, save_adapter
from llava_steering_plugin.adapters.parts.image_parts import image_parameters
from llava_steering_plugin.adapters.save_load import describe
from llava_steering_plugin.modes.mores import MoReS

ANYRES = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[IMAGE_SIDE, 2 * IMAGE_SIDE], [2 * IMAGE_SIDE, IMAGE_SIDE]],
}
TOKENS = {"[PAD]": 700, "<im_start>": 701, "<im_end>": 702}
# Another way to look at the same pictures.
SETTINGS = {"mm_vision_select_layer": -1, "image_aspect_ratio": "square"}
# What each adapter brings beside its modules; and what its base is, where that is not the tiny LLaVA as it is.
KINDS: dict[str, set[str]] = {
    "modules": set(),
    "projector": {"projector"},
    "tokens": {"tokens"},
    "tokens in rows that the base has": {"tokens", "large base"},
    "newline": {"projector", "anyres"},
    "settings": {"settings"},
    "all": {"projector", "tokens", "settings", "anyres"},
}


def base(tiny: TinyLlava, kind: str) -> Any:
    """Return the base of a kind of adapter, in float32."""
    parts = KINDS[kind]
    model = load_llava(tiny.llava, **(ANYRES if "anyres" in parts else {}))
    generator = torch.Generator().manual_seed(5)
    if "anyres" in parts:
        newline = model.get_model().image_newline
        newline.data = torch.randn(newline.shape, generator=generator)
    if "large base" in parts:
        model.resize_token_embeddings(720)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight.data[700:] = torch.randn(20, 64, generator=generator)
    return model.requires_grad_(False)


def tokenizer_of(tiny: TinyLlava) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny.llava, use_fast=False)


def save(tiny: TinyLlava, kind: str, folder: Path, seed: int = 0) -> Path:
    """Save an adapter of that kind, strong in every part that it brings."""
    parts, model = KINDS[kind], base(tiny, kind)
    generator = torch.Generator().manual_seed(100 + seed)
    attachment = strengthen(attach(model, MoReS(rank=2, tokens="all")), seed)
    described = describe(attachment)
    if "tokens" in parts:
        described = replace(described, added_tokens=dict(TOKENS))
        if "large base" not in parts:
            model.resize_token_embeddings(703)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight.data[700:703] = torch.randn(3, 64, generator=generator) * 3
        model.config.mm_use_im_start_end = True
    if "projector" in parts:
        for name, value in image_parameters(model).items():
            value.data += 0.5 * torch.randn(value.shape, generator=generator)
            attachment.extras.add(name)
    if "settings" in parts:
        model.config.update(SETTINGS if "anyres" not in parts else {"mm_vision_select_layer": -1})
    attachment.config = replace(described, base=replace(described.base, name_or_path=str(tiny.llava)))
    save_adapter(model, folder)
    return folder


ROW = [1, *words(3), IMAGE, *words(4, seed=1)]
LABELS = ids_of([-100] * 5 + ROW[5:])


def images(kind: str) -> dict[str, Any]:
    """Return the arguments that pass a picture."""
    if "anyres" in KINDS[kind]:
        return {"images": [pictures(3)], "image_sizes": [(2 * IMAGE_SIDE, IMAGE_SIDE)]}
    return {"images": pictures(1)}


def ask(model: Any, kind: str) -> dict[str, Any]:
    """Return what a model makes of a question with a picture and of one without, in logits, loss and tokens."""
    ids, length = ids_of(ROW), {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with torch.inference_mode():
        seen = images(kind)
        seen["images"] = [each.to(model.dtype) for each in seen["images"]]
        if "anyres" not in KINDS[kind]:
            seen["images"] = torch.stack(seen["images"])
        with_image = model(input_ids=ids, labels=LABELS, **seen)
        text = model(input_ids=ids_of(words(8)))
        return {
            "logits": with_image.logits,
            "loss": with_image.loss,
            "text": text.logits,
            "tokens": model.generate(ids, **seen, **length),
            "tokens of text": model.generate(ids_of(words(8)), **length),
        }


def equal(here: dict[str, Tensor], there: dict[str, Tensor]) -> bool:
    return all(torch.equal(here[name], there[name]) for name in here.keys() | there.keys())


Ask = Callable[[Any, str], dict[str, Tensor]]
