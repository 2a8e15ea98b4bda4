"""Score an answer given pixels: the summed log-probability of its tokens, which attributions to the image explain."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_steering_plugin.diagnostics.positions import ForcedPass
from llava_steering_plugin.inference.images import as_pictures
from llava_steering_plugin.measures.modality import Kind, answer_queries


@dataclass(frozen=True)
class AnswerScore:
    """Computes log p(answer | question, pixels) of one model, for several pixels at once.

    Attributes:
        model: the LLaVA, with a pool on it.
        this_pass: over the question with its answer.
        size: width and height of the image.
        dtype: the precision in which the model gets pixels.
        adapter: whose name the pool is asked by.
    """

    model: Any
    this_pass: ForcedPass
    size: tuple[int, int]
    dtype: torch.dtype
    adapter: str

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the score of each row, float32 [rows].

        Args:
            pixels: preprocessed, float [rows, 3, H, W], or [rows, tiles, 3, H, W].
        """
        rows = len(pixels)
        given = {name: value.expand(rows, -1) for name, value in self.this_pass.given.items()}
        output = self.model(
            **given,
            images=pixels.to(self.dtype),
            image_sizes=[self.size] * rows,
            **as_pictures(self.model, rows),
            adapter_names=[self.adapter] * rows,
            use_cache=False,
        )
        return self.of_logits(output.logits)

    def of_logits(self, logits: Tensor) -> Tensor:
        """Return the score of each row from the logits of its pass, [rows, positions, vocabulary]."""
        asked = answer_queries(self.this_pass.kinds)[0].to(logits.device)
        labels = self.this_pass.given["labels"][0]
        answer = labels[-int((self.this_pass.kinds == Kind.ANSWER).sum()) :].to(logits.device)
        found: Tensor = logits[:, asked].float().log_softmax(-1)
        places = answer.expand(len(found), -1)[..., None]
        return found.gather(2, places).squeeze(2).sum(1)


@contextmanager
def differentiable_tower(model: Any) -> Iterator[None]:
    """Let gradients reach the pixels inside the block: LLaVA computes its vision tower without them."""
    tower = model.get_vision_tower()
    before = vars(tower).get("forward")
    tower.forward = types.MethodType(inspect.unwrap(type(tower).forward), tower)
    try:
        yield
    finally:
        del tower.forward
        if before is not None:
            tower.forward = before
