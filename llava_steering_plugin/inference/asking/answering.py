"""Answers questions in batches in which every question may ask a different adapter.

Upstream's own eval scripts ask one question at a time; the answers here are the same, because every row of a batch is
computed as it is alone. Only where two tokens are equally likely in half precision may a batch of unequal lengths round
to the other one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.hooks.finite_rows import broken_rows
from llava_steering_plugin.inference.asking.prompts import CONVERSATION, said, write_prompt
from llava_steering_plugin.inference.asking.questions import Question
from llava_steering_plugin.inference.base_model import LoadedBase
from llava_steering_plugin.inference.images import image_arguments, read_image
from llava_steering_plugin.upstream.text.conversations import checked_template, template_of_base


@dataclass(frozen=True)
class Answer:
    """The answer to a question; `error` says why there is none."""

    text: str
    error: str | None = None


@dataclass(frozen=True)
class AnswerOptions:
    """Settings for answering questions.

    Attributes:
        batch_size: questions answered at the same time.
        conversation: LLaVA's template for all of them; None: each adapter's own, `CONVERSATION` for the base.
        generation: further arguments of `generate`.
        seed: of the random numbers, where tokens are sampled.
    """

    batch_size: int
    conversation: str | None
    generation: dict[str, Any]
    seed: int = 0


class BatchAnswers:
    """Answers questions with the adapters on a LLaVA.

    Args:
        images: the folder of the images that questions name.

    Raises:
        ArgumentsError: the model takes no images.
    """

    def __init__(self, loaded: LoadedBase, images: Path, options: AnswerOptions):
        self.pool, self.tokenizer, self.processor = loaded.pool, loaded.tokenizer, loaded.processor
        self.model: Any = loaded.pool.model
        self.images, self.options = images, options
        if not hasattr(self.model, "prepare_inputs_labels_for_multimodal"):
            raise ArgumentsError(f"{type(self.model).__name__} is no LLaVA; questions about images need one.")

    def with_options(self, options: AnswerOptions) -> BatchAnswers:
        """Return the same models with other settings."""
        other = copy(self)
        other.options = options
        return other

    def batches(
        self, questions: Sequence[Question], first: int = 0
    ) -> Iterator[tuple[int, Sequence[Question], Sequence[Answer]]]:
        """Yield the number of the first question, the questions and the answers of each batch.

        Args:
            first: begin with this question. A batch is answered as it is in a run from the beginning, also if tokens
                are sampled: every batch has random numbers of its own.

        Where the logits of a question became NaN or infinite, its text is empty, and its error names the adapter.

        Raises:
            ArgumentsError: an image cannot be read; the batches before it have been answered.
        """
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        for start in range(first, len(questions), self.options.batch_size):
            batch = questions[start : start + self.options.batch_size]
            with torch.random.fork_rng(devices=devices), broken_rows() as broken:
                torch.manual_seed(random.Random(f"{self.options.seed} {start}").getrandbits(63))
                texts = self.texts(self.generated(batch))
            yield (
                start,
                batch,
                [Answer("" if row in broken else text, broken.get(row)) for row, text in enumerate(texts)],
            )

    def prompt(self, question: Question) -> str:
        """Return the question in its conversation template, as upstream's eval scripts write it."""
        return write_prompt(question, self.template(question), self.model.config)

    def prompt_ids(self, question: Question) -> list[int]:
        """Return the token ids of a question's prompt, with LLaVA's placeholder for each image."""
        from llava.constants import IMAGE_TOKEN_INDEX
        from llava.mm_utils import tokenizer_image_token

        return list(tokenizer_image_token(self.prompt(question), self.tokenizer, IMAGE_TOKEN_INDEX))

    def template(self, question: Question) -> str:
        """Return the name of the conversation template that a question is asked in."""
        return checked_template(
            self.options.conversation
            or self.pool.details(question.adapter).conversation
            or template_of_base(vars(self.model.config))
            or CONVERSATION
        )

    def said(self, question: Question) -> str:
        """Return what the user says: the question, with LLaVA's mark for every image."""
        return said(question, self.model.config)

    def generated(self, batch: Sequence[Question]) -> Tensor:
        """Return the token ids of the answers to a batch, int64 [questions, longest answer].

        Raises:
            ArgumentsError: an image cannot be read.
        """
        ids, attention = self._tokens(batch)
        padding = self.tokenizer.pad_token_id
        pad_token = {"pad_token_id": self.tokenizer.eos_token_id if padding is None else padding}
        with torch.inference_mode(), self.uncut():
            output: Tensor = self.model.generate(
                ids,
                attention_mask=attention,
                adapter_names=[question.adapter for question in batch],
                **self.pixels(batch),
                **pad_token,
                **self.options.generation,
            )
        return output

    def texts(self, generated: Tensor) -> list[str]:
        """Return what the ids of answers say, as the answer file has it."""
        return [text.strip() for text in self.tokenizer.batch_decode(generated, skip_special_tokens=True)]

    def _tokens(self, batch: Sequence[Question]) -> tuple[Tensor, Tensor]:
        """Return token ids [questions, longest prompt], padded on the left, and their attention mask."""
        rows = [self.prompt_ids(each) for each in batch]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        present = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return ids.to(self.model.device), present.to(self.model.device)

    def pixels(self, batch: Sequence[Question]) -> dict[str, Any]:
        """Return the arguments of `generate` that pass the images: those of the first question, of the second, and on.

        Raises:
            ArgumentsError: an image cannot be read.
        """
        if not any(question.images for question in batch):
            return {}
        pictures = [picture for question in batch for picture in self._pictures(question)]
        return image_arguments(pictures, self.processor, self.model)

    def _pictures(self, question: Question) -> list[Image.Image]:
        """Return the images that LLaVA takes for the row of a question, in the order of their placeholders."""
        if not question.images:
            # LLaVA wants an image for every row; it ignores the one of a row without a placeholder.
            side = self.processor.crop_size["height"]
            return [Image.new("RGB", (side, side))]
        try:
            return self.opened(question)
        except ArgumentsError as error:
            raise ArgumentsError(
                f"question {question.id!r} cannot be asked: {error} Repair the file or remove the question; "
                "the batches before it have been answered."
            ) from error

    def opened(self, question: Question) -> list[Image.Image]:
        """Return the images that a question names, in RGB.

        Raises:
            ArgumentsError: one cannot be read.
        """
        return [read_image(self.images / name) for name in question.images]

    @contextmanager
    def uncut(self) -> Iterator[None]:
        """Have LLaVA cut no prompt inside the block. It would cut one without an image too, for the others' images."""
        config = self.model.config
        before = getattr(config, "tokenizer_model_max_length", None)
        config.tokenizer_model_max_length = None
        try:
            yield
        finally:
            config.tokenizer_model_max_length = before
