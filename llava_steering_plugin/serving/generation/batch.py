"""Generates the answers of several rows in one call of the model.

transformers 4.37 has one way to choose tokens, one length, one stopping answer and one stream for all rows of a batch.
So one logits processor does it row by row: it chooses each row's token and hands it to the row, which ends its answer
where it is complete. The token is then the only one that is left to choose. A row that has ended gets the end token
until the last one has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.hooks.finite_rows import not_finite
from llava_steering_plugin.inference.images import as_pictures
from llava_steering_plugin.pool.row_by_row import reading_row_by_row
from llava_steering_plugin.serving.generation.prompts import Prompts
from llava_steering_plugin.serving.generation.row import Row
from llava_steering_plugin.serving.generation.sampling import choose_tokens

logger = logging.getLogger(__name__)


class TokensByRow(LogitsProcessor):
    """Chooses the next token of each row, and hands it to the row.

    Args:
        ends: the tokens that end an answer.
        begun: called at the first tokens.
    """

    def __init__(self, rows: Sequence[Row], ends: Sequence[int], begun: Callable[[], None]):
        self.rows, self.ends, self.begun = rows, ends, begun
        self.steps = 0
        self._first: dict[int, int] = {}

    def first(self, numbers: Sequence[int], scores: Tensor) -> None:
        """Choose the first tokens of some rows, whose prompts were read before those of the others.

        Args:
            scores: float [rows, vocabulary], of these rows.
        """
        self._first |= zip(numbers, self._chosen([self.rows[number] for number in numbers], scores), strict=True)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.steps:
            self.begun()
        if not self.steps and self._first:
            tokens = [self._first[number] for number in range(len(self.rows))]
        else:
            tokens = self._chosen(self.rows, scores)
        self.steps += 1
        forced = torch.full_like(scores, -1e4)  # finite in float16, too
        return forced.scatter_(1, torch.tensor(tokens, device=scores.device).unsqueeze(1), 0)

    def _chosen(self, rows: Sequence[Row], scores: Tensor) -> list[int]:
        """Choose the next tokens of rows, and hand them to the rows; return those to go on with."""
        broken = not_finite(scores)
        # A row that has taken this token already, before its batch failed, goes on from there.
        before = [row.last if row.tokens > self.steps else None for row in rows]
        samplers = [
            None if row.ended or row.answer.cancelled or token is not None else row.sampler
            for row, token in zip(rows, before, strict=True)
        ]
        chosen = choose_tokens(samplers, scores, broken)
        # The only wait for the device in a step.
        tokens: list[int]
        tokens, without = torch.stack((chosen, broken.long())).tolist()
        for number, (row, token) in enumerate(zip(rows, before, strict=True)):
            row.end_if_cancelled()
            if token is not None:
                tokens[number] = token
            elif not row.ended and without[number]:
                row.end_without_numbers()
            elif not row.ended:
                row.take(tokens[number], self.ends)
            if row.ended:
                tokens[number] = self.ends[0] if self.ends else 0
        return tokens


class AllEnded(StoppingCriteria):
    """Ends the generation with the last answer."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> bool:
        return all(row.ended for row in self.rows)


class Watcher(Protocol):
    """Is told how a batch goes."""

    def begun(self) -> None:
        """Note that the first tokens are there."""

    def generated(self, rows: int, steps: int) -> None:
        """Note how many rows have been generated together, and in how many passes."""


def answer_rows(prompts: Prompts, rows: Sequence[Row], watcher: Watcher) -> None:
    """Answer rows that may share a batch; all of them have ended when it returns.

    Where a batch fails before a row has its second token, its rows are tried again one by one, and only the one that is
    to blame fails: it may be a prompt whose tokens cannot be told apart, or memory that is too small for all of them.
    """
    error = _generated(prompts, rows, watcher)
    if error is None:
        return
    if len(rows) > 1 and all(row.tokens < 2 for row in rows):
        logger.warning("%d answers failed before their second token; each is tried again alone", len(rows))
        for row in rows:
            if not row.ended:
                answer_rows(prompts, [row], watcher)
        return
    for row in rows:
        row.fail(error)


def _generated(prompts: Prompts, rows: Sequence[Row], watcher: Watcher) -> Exception | None:
    """Generate; return what went wrong. Not raised: a traceback would hold the tensors of the batch."""
    model = prompts.model
    settings = deepcopy(model.generation_config)
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    ends = [end for end in ends if end is not None]
    choose = TokensByRow(rows, ends, watcher.begun)
    # Of no use to greedy decoding; transformers would warn of other values.
    settings.do_sample, settings.temperature, settings.top_p, settings.top_k = False, 1.0, 1.0, 50
    settings.num_beams, settings.use_cache = 1, True
    settings.pad_token_id = ends[0] if ends else 0
    settings.max_new_tokens = max(row.most for row in rows)
    ids, attention = _padded(rows, model.device)
    try:
        with torch.inference_mode(), reading_row_by_row(choose.first):
            model.generate(
                ids,
                attention_mask=attention,
                adapter_names=[row.adapter for row in rows],
                generation_config=settings,
                logits_processor=LogitsProcessorList([choose]),
                stopping_criteria=StoppingCriteriaList([AllEnded(rows)]),
                **_images(model, prompts, rows),
            )
        watcher.generated(len(rows), choose.steps)
    except SteeringError as error:
        logger.warning("answers failed: %s: %s", type(error).__name__, error)
        return error.with_traceback(None)
    except Exception as error:
        logger.exception("answers failed")
        return error.with_traceback(None)
    return None


def _padded(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return token ids [rows, longest prompt], padded on the left, and their attention mask where there is padding."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row.ids)) + list(row.ids) for row in rows], device=device)
    if len(rows) == 1:
        return ids, None
    present = torch.tensor([[0] * (longest - len(row.ids)) + [1] * len(row.ids) for row in rows], device=device)
    return ids, present


def _images(model: Any, prompts: Prompts, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the arguments of `generate` that pass the images: those of the first row, of the second, and on."""
    if not any(row.pixels for row in rows):
        return {}
    pixels = [each for row in rows for each in (row.pixels or [prompts.blank])]
    height, width = prompts.blank.shape[-2:]
    sizes = [size for row in rows for size in (row.sizes or [(width, height)])]
    # As LLaVA's `process_images` returns them: one tensor of pictures, or a list of pictures of several tiles.
    together = pixels[0].dim() == 3 and len({each.shape for each in pixels}) == 1
    images = torch.stack(pixels) if together else pixels
    return {"images": images, "image_sizes": sizes, **as_pictures(model, len(pixels))}
