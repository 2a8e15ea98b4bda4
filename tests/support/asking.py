"""Questions to a model through upstream's Python API: what its programs have to answer, too."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Question:
    """`image` is a file's name, None for text alone."""

    text: str
    image: str | None


class Asker:
    """Loads models with `load_pretrained_model` under the names that upstream gives them, and asks them, greedily."""

    def __init__(self, images: Path):
        self.images = images
        self.load = functools.cache(self._load)

    def __call__(
        self,
        path: str | Path,
        question: Question,
        *,
        base: str | None = None,
        conversation: str = "vicuna_v1",
        max_new_tokens: int = 16,
    ) -> str:
        """The answer to the question as the first of a conversation."""
        prompt = self.prompt(question, conversation)
        return self.complete(path, prompt, question.image, base=base, max_new_tokens=max_new_tokens)

    @staticmethod
    def prompt(question: Question, conversation: str = "vicuna_v1") -> str:
        from llava.conversation import conv_templates

        chat = conv_templates[conversation].copy()
        chat.append_message(chat.roles[0], ("<image>\n" if question.image else "") + question.text)
        chat.append_message(chat.roles[1], None)
        return str(chat.get_prompt())

    def complete(
        self, path: str | Path, prompt: str, image: str | None, *, base: str | None = None, max_new_tokens: int = 16
    ) -> str:
        """What follows the prompt, with its `<image>` replaced by the image."""
        import torch
        from llava.constants import IMAGE_TOKEN_INDEX
        from llava.mm_utils import process_images, tokenizer_image_token
        from PIL import Image

        tokenizer, model, processor = self.load(str(path), base)
        pixels = None
        image_arguments: dict[str, Any] = {}
        if image is not None:
            picture = Image.open(self.images / image).convert("RGB")
            pixels = process_images([picture], processor, model.config).half()
            image_arguments = {"images": pixels, "image_sizes": [picture.size]}
        ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
        with torch.inference_mode():
            output = model.generate(ids, do_sample=False, max_new_tokens=max_new_tokens, **image_arguments)
        return str(tokenizer.decode(output[0], skip_special_tokens=True)).strip()

    @staticmethod
    def _load(path: str, base: str | None) -> tuple[Any, Any, Any]:
        from llava.mm_utils import get_model_name_from_path
        from llava.model.builder import load_pretrained_model

        tokenizer, model, processor, _ = load_pretrained_model(path, base, get_model_name_from_path(path), device="cpu")
        return tokenizer, model, processor
