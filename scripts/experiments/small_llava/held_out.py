"""Ask a model of stage 1 about pictures that it was not trained with: losses of their captions, and its own words."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationMixin

from experiments.small_llava.pictures import Captioned

NEW_TOKENS = 16
IGNORED = -100  # targets without a loss


class Model:
    """A LLaVA of stage 1, loaded by LLaVA's loader, in float32 on the CPU."""

    def __init__(self, folder: Path, base: Path, pictures: Path):
        from llava.mm_utils import process_images, tokenizer_image_token
        from llava.model.builder import load_pretrained_model

        self.tokenizer, model, processor, _ = load_pretrained_model(
            str(folder), str(base), folder.name, device_map="cpu", device="cpu"
        )
        self.model: Any = model.float().eval()
        self._ids: Callable[[str], Tensor] = lambda text: tokenizer_image_token(
            text, self.tokenizer, return_tensors="pt"
        )[None]
        self._pixels: Callable[[str], Tensor] = lambda image: process_images(
            [Image.open(pictures / image)], processor, self.model.config
        ).float()

    @torch.inference_mode()
    def loss(self, image: str, caption: str) -> float:
        """Return the loss of a caption behind an image, as stage 1 has it: the mean over its tokens."""
        ids = self._ids(f"<image>{caption}\n")
        labels = ids.masked_fill(ids < 0, IGNORED)
        return float(self.model(input_ids=ids, labels=labels, images=self._pixels(image)).loss)

    @torch.inference_mode()
    def said(self, image: str) -> str:
        """Return what the model writes behind an image, up to the end of the line; the likeliest token each time."""
        # LLaVA takes a prompt of one token, which an image alone is here, for a decode step, and leaves the image out.
        written = GenerationMixin.generate(
            self.model,
            inputs_embeds=self.model.encode_images(self._pixels(image)),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
        )
        text: str = self.tokenizer.decode(written[0], skip_special_tokens=True)
        return text.strip().partition("\n")[0]


def measured(
    model: Model, own: Sequence[Captioned], others: Sequence[Captioned], report: Callable[[int, int], None]
) -> dict[str, Any]:
    """Return losses of captions with their own pictures and with other ones, and what is said of each picture.

    Args:
        own: captions with their pictures.
        others: the same captions with other pictures.
        report: is told how many are done, and of how many.
    """
    rows: list[dict[str, Any]] = []
    for place, (right, wrong) in enumerate(zip(own, others, strict=True)):
        rows.append(
            {
                "image": right.image,
                "caption": right.caption,
                "said": model.said(right.image),
                "loss": model.loss(right.image, right.caption),
                "loss_with_another": model.loss(wrong.image, wrong.caption),
            }
        )
        report(place + 1, len(own))
    return {"rows": rows, **paired([row["loss"] for row in rows], [row["loss_with_another"] for row in rows])}


def paired(own: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Return both means, the mean difference (others - own) with its standard error, and how often `own` is smaller."""
    gains = [other - mine for mine, other in zip(own, others, strict=True)]
    return {
        "own": statistics.mean(own),
        "others": statistics.mean(others),
        "difference": statistics.mean(gains),
        "standard_error": statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None,
        "smaller": sum(gain > 0 for gain in gains),
        "of": len(gains),
    }
