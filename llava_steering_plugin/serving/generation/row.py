"""One row of a batch: the prompt as the model reads it, and the answer as it grows token by token."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.serving.generation.answer import Answer
from llava_steering_plugin.serving.generation.request import GONE, NO_ANSWER, NOT_FINITE, End, Piece, Problem
from llava_steering_plugin.serving.generation.sampling import Sampler
from llava_steering_plugin.serving.generation.text import AnswerText

logger = logging.getLogger(__name__)


@dataclass
class Row:
    """One answer on its way through the model. It ends its answer itself, and then at once.

    Attributes:
        answer: gets the events.
        adapter: its name in the pool.
        ids: of the prompt, with LLaVA's placeholder for each image.
        pixels: of its images, each [channels, height, width] or [tiles, channels, height, width].
        sizes: width and height of the images.
        length: positions of the prompt in the decoder.
        most: tokens after which the answer ends.
        alone: it would be another answer in a batch with others.
        tokens: how many have been generated so far.
        last: the newest of them.
    """

    answer: Answer
    adapter: str
    ids: Sequence[int]
    pixels: list[Tensor]
    sizes: list[tuple[int, int]]
    length: int
    most: int
    alone: bool
    sampler: Sampler
    text: AnswerText
    tokens: int = 0
    last: int | None = None

    @property
    def ended(self) -> bool:
        """True once its answer has its end; the row is in the batch for the others' sake then."""
        return self.answer.ended

    def take(self, token: int, ends: Collection[int]) -> None:
        """Add the next token to the answer, and end it where it is complete.

        Args:
            ends: the tokens that end any answer.
        """
        self.tokens += 1
        self.last = token
        if token in ends:
            self._complete("stop", self.text.rest())
            return
        piece = self.text.add(token)
        if self.text.stopped:
            self._complete("stop", piece)
        elif self.tokens >= self.most:
            self._complete("length", piece + self.text.rest())
        else:
            self.answer.put(Piece(piece, self.tokens))

    def end_if_cancelled(self) -> None:
        """End the answer if nobody wants the rest of it."""
        if self.answer.cancelled:
            self.answer.put(End("cancelled", self.length, self.tokens))

    def end_without_numbers(self) -> None:
        """End the answer because its logits are NaN or infinite."""
        logger.warning("an answer failed: the logits of %r became NaN or infinite", self.adapter)
        self._fail(Problem.NOT_FINITE, NOT_FINITE)

    def fail(self, error: Exception) -> None:
        """End the answer because of an error of its batch."""
        self._fail(*_blamed(error))

    def _complete(self, reason: Any, text: str) -> None:
        self.answer.put(Piece(text, self.tokens))
        self.answer.put(End(reason, self.length, self.tokens))

    def _fail(self, problem: Problem, message: str) -> None:
        self.answer.put(End("error", self.length, self.tokens, problem, message))


def fail_unread(answer: Answer, error: Exception) -> None:
    """End an answer that could not become a row."""
    problem, message = _blamed(error)
    answer.put(End("error", problem=problem, message=message))


def _blamed(error: Exception) -> tuple[Problem, str]:
    # Of the arguments only the adapter's name can be wrong by now: it was removed while the request waited.
    return (Problem.GONE, GONE) if isinstance(error, ArgumentsError) else (Problem.FAILED, NO_ANSWER)
