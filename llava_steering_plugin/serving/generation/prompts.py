"""Makes rows of requests: tokens, pixels, and how long an answer may become."""

from __future__ import annotations

import io
from functools import cached_property
from typing import Any

from PIL import Image
from torch import Tensor

from llava_steering_plugin.inference.context import PromptTokens
from llava_steering_plugin.inference.images import half_unless_full
from llava_steering_plugin.inference.squares import process_images
from llava_steering_plugin.pool.pool import AdapterPool
from llava_steering_plugin.serving.generation.answer import Answer
from llava_steering_plugin.serving.generation.images import decode_image
from llava_steering_plugin.serving.generation.request import REPLACED, End, GenerationRequest, Problem
from llava_steering_plugin.serving.generation.row import Row
from llava_steering_plugin.serving.generation.sampling import Sampler
from llava_steering_plugin.serving.generation.text import AnswerText, special_stops
from llava_steering_plugin.upstream.text.conversations import marked_as

# Rotary embeddings that change with the longest row of a batch, beyond the length the model was trained with.
LENGTHS_COUNT = ("dynamic", "longrope", "su")


class Prompts:
    """Makes rows for the model of a pool.

    Args:
        processor: of images; None where the model takes none.
    """

    def __init__(self, pool: AdapterPool, tokenizer: Any, processor: Any):
        self.pool, self.tokenizer, self.processor = pool, tokenizer, processor
        self.model: Any = pool.model

    def row(self, answer: Answer) -> Row | None:
        """Return the row of an answer; None where the answer has been ended instead.

        Raises:
            ArgumentsError: its adapter is not there any more.
        """
        request = answer.request
        if request is None or answer.cancelled:
            answer.put(End("cancelled"))
            return None
        details = self.pool.details(request.adapter)
        if not isinstance(request.prompt, str) and details.conversation != request.template:
            answer.put(End("error", problem=Problem.REPLACED, message=REPLACED))
            return None
        sizes = [_size(image) for image in request.images]
        ids = self._ids(request)
        tokens = PromptTokens.of_model(self.model)
        length, most = tokens.count(ids, sizes), tokens.context.prompt(bool(sizes))
        if most is not None and length > most:
            message = f"The conversation has {length:,} tokens; this model takes {most:,}. Please start a new one."
            answer.put(End("error", length, problem=Problem.TOO_LONG, message=message))
            return None
        positions = tokens.context.positions
        longest = request.max_new_tokens if positions is None else min(request.max_new_tokens, positions - length)
        answer.request = None  # its files are not needed any more
        # Unpacked one by one, and shrunk before the next.
        pixels = [self.pixels(decode_image(image)) for image in request.images]
        return Row(
            answer,
            request.adapter,
            ids,
            pixels,
            sizes,
            length,
            longest,
            details.reads_padding or self._lengths_count or self._cut(length, bool(sizes)),
            Sampler(request.temperature if request.samples else None, request.top_p, self._top_k, request.seed),
            AnswerText(self.tokenizer, request.stop, special_stops(self.tokenizer, request.stop)),
        )

    def pixels(self, picture: Image.Image) -> Tensor:
        """Return one picture for the vision tower: [channels, height, width], or of several tiles."""
        pixels: Tensor = process_images([picture], self.processor, self.model.config)[0]
        return pixels.to(self.model.device, half_unless_full(self.model))

    @cached_property
    def blank(self) -> Tensor:
        """Pixels of one tile for rows without an image, which LLaVA wants beside others; it uses none of them."""
        side = self.processor.crop_size["height"]
        pixels = self.pixels(Image.new("RGB", (side, side)))
        return pixels[:1] if pixels.dim() == 4 else pixels

    def _ids(self, request: GenerationRequest) -> list[int]:
        from llava.mm_utils import tokenizer_image_token

        if not isinstance(request.prompt, str):
            return list(request.prompt)
        prompt = marked_as(request.prompt, self.model.config) if request.images else request.prompt
        return list(tokenizer_image_token(prompt, self.tokenizer))

    @property
    def _top_k(self) -> int:
        return getattr(getattr(self.model, "generation_config", None), "top_k", None) or 0

    @property
    def _lengths_count(self) -> bool:
        """True if the rotary embedding of a row would depend on the others' lengths."""
        scaling = getattr(self.model.config, "rope_scaling", None) or {}
        return scaling.get("type", scaling.get("rope_type")) in LENGTHS_COUNT

    def _cut(self, length: int, images: bool) -> bool:
        """Say whether LLaVA would cut a prompt without images because others have some."""
        spliced = getattr(self.model.config, "tokenizer_model_max_length", None)
        return not images and spliced is not None and length > spliced


def _size(image: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(image)) as file:
        width, height = file.size
    return width, height
