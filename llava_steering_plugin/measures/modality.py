"""Measure whether a model's answers attend to the image or to the text, layer by layer.

LLaVA Steering (arXiv 2412.12359), eq. 2, the layer-wise modality attention ratio:

    LMAR_l = 1/N sum_n  (mean attention per image token)_n,l  /  (mean attention per text token)_n,l

1 is balance, more is more for the image. The queries are the positions that predict the answer; attention is averaged
over them and over the heads before the ratio is taken. The text is the prompt's: which of its tokens count is a choice
that moves the ratio by a factor, because the first token is a sink that draws attention whatever it says. So all
choices of `TEXTS` are given side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava_steering_plugin.hooks.token_map import IGNORED, TokenMap
from llava_steering_plugin.measures.attention import attention_taken, last_attention_taken, layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Kind(IntEnum):
    """Names what a position of a prompt with its answer holds; padding is `PADDING`."""

    FIRST = 0  # the beginning-of-sequence token
    SYSTEM = 1
    PROMPT = 2  # all other text before the answer
    IMAGE = 3
    ANSWER = 4


PADDING = -1
# The texts that image tokens are compared with, by the name that tables give them.
TEXTS: Mapping[str, frozenset[Kind]] = {
    "all text": frozenset({Kind.FIRST, Kind.SYSTEM, Kind.PROMPT}),
    "without the first token": frozenset({Kind.SYSTEM, Kind.PROMPT}),
    "without the system prompt": frozenset({Kind.FIRST, Kind.PROMPT}),
    "without both": frozenset({Kind.PROMPT}),
}


@dataclass(frozen=True)
class Shares:
    """Holds how the attention of one answer divides over the kinds of tokens before it.

    Attributes:
        counts: the number of tokens of each kind.
        queries: the number of positions that the attention is averaged over.
        shares: float64 [layers, heads, kinds]; the sum over the kinds is 1.
    """

    counts: Mapping[Kind, int]
    queries: int
    shares: Tensor

    def per_token(self, kinds: Collection[Kind]) -> Tensor:
        """Return the mean attention to one token of these kinds, averaged over the heads, float64 [layers]."""
        return self.shares[..., list(kinds)].sum(-1).mean(1) / sum(self.counts[kind] for kind in kinds)

    def ratio(self, text: Collection[Kind]) -> Tensor:
        """Return the fraction of eq. 2 for this answer, float64 [layers]; NaN where there is no such text or image."""
        return self.per_token((Kind.IMAGE,)) / self.per_token(text)

    def ratios(self, text: Collection[Kind]) -> Tensor:
        """Return the same for each head alone, float64 [layers, heads]."""
        of_text = self.shares[..., list(text)].sum(-1) / sum(self.counts[kind] for kind in text)
        return self.shares[..., Kind.IMAGE] / self.counts[Kind.IMAGE] / of_text


def answer_queries(kinds: Tensor) -> Tensor:
    """Return which positions predict an answer's tokens, bool [rows, positions].

    Args:
        kinds: int64 [rows, positions], a `Kind` or `PADDING`; the answer is the end of its row.
    """
    follows = torch.zeros_like(kinds, dtype=torch.bool)
    follows[:, :-1] = kinds[:, 1:] == Kind.ANSWER
    return follows


def kinds_in_training(tokens: TokenMap, labels: Tensor, first: Tensor) -> Tensor:
    """Return what the positions of training samples hold, up to the end of each one's first answer; `PADDING` after.

    Later turns are left out: the first answer cannot see them. A batch does not tell the system prompt apart, so it
    counts as `PROMPT`.

    Args:
        tokens: the map of the spliced batch.
        labels: int64 [rows, positions] after the splice, `IGNORED` where nothing is supervised.
        first: bool [rows], whether a row begins with a beginning-of-sequence token.
    """
    supervised = labels != IGNORED
    before = supervised.cumsum(1) == 0
    ended = (~before & ~supervised).cumsum(1) > 0
    kinds = torch.full(labels.shape, PADDING, device=labels.device)
    kinds[tokens.attention & before] = int(Kind.PROMPT)
    kinds[tokens.visual & before] = int(Kind.IMAGE)
    kinds[supervised & ~ended] = int(Kind.ANSWER)
    start = tokens.attention.int().argmax(1, keepdim=True)
    begins = first[:, None] & (kinds.gather(1, start) == Kind.PROMPT)
    return kinds.scatter(1, start, torch.where(begins, int(Kind.FIRST), kinds.gather(1, start)))


def measure_shares(model: PreTrainedModel, forward: Callable[[], Any], kinds: Tensor) -> list[Shares]:
    """Measure how the attention of each row's answer divides, in one forward pass.

    Args:
        forward: runs the pass of `model` over prompts with their answers.
        kinds: int64 [rows, positions], what the pass's positions hold, after the splice.

    Raises:
        SteeringError: the model's attention cannot be read.
    """
    queries = answer_queries(kinds)
    sums: list[list[Tensor | None]] = [[None] * layers_of(model) for _ in kinds]
    members = torch.stack([(kinds == kind) for kind in Kind], -1).double()

    def take(layer: int, row: int, weights: Tensor) -> None:
        part = weights.sum(1).double().cpu() @ members[row].cpu()
        before = sums[row][layer]
        sums[row][layer] = part if before is None else before + part

    with attention_taken(model, queries, take):
        forward()
    measured = []
    for row, layers in enumerate(sums):
        taken = [part for part in layers if part is not None]
        number = int(queries[row].sum())
        counts = {kind: int((kinds[row] == kind).sum()) for kind in Kind}
        measured.append(Shares(counts, number, torch.stack(taken) / number))
    return measured


class GenerationShares:
    """Measures how the attention of answers divides while a model generates them; no pass is needed for it.

    A generation's first pass predicts the first token of every answer, and each later one the next token, so the
    queries of eq. 2 are the last position of every pass.

    Args:
        model: the model that will generate, greedily or by sampling, not by beams.
        prompt: called when the first pass has begun; returns what the prompts' positions hold, int64
            [rows, positions], with padding on the left.

    Attributes:
        whole: False if a pass saw other keys than all before it, such as a window of them; then nothing is measured.
    """

    def __init__(self, model: PreTrainedModel, prompt: Callable[[], Tensor]):
        self._model, self._prompt, self._layers = model, prompt, layers_of(model)
        self.whole = True
        self._kinds: Tensor | None = None
        self._members: Tensor | None = None  # float32 [rows, positions, kinds]: 1 where a position is of a kind
        self._parts: list[Tensor] = []  # float32 [rows, heads, kinds] for each layer of each pass

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure the generation in the block.

        Raises:
            SteeringError: the model's attention cannot be read.
        """
        with last_attention_taken(self._model, self._take):
            yield

    @property
    def prompts(self) -> Tensor:
        """The kinds of the prompts' positions, int64 [rows, positions]."""
        assert self._kinds is not None, "nothing was generated"
        return self._kinds

    def of(self, row: int, tokens: int) -> Shares:
        """Return the measurement of one row.

        Args:
            tokens: how many of the row's first tokens are its answer, 1 or more.
        """
        shares = self._gathered[:tokens, :, row].double().mean(0)
        counts = {kind: int((self.prompts[row] == kind).sum()) for kind in Kind} | {Kind.ANSWER: tokens}
        return Shares(counts, tokens, shares)

    @cached_property
    def _gathered(self) -> Tensor:
        """All parts, float32 [passes, layers, rows, heads, kinds]."""
        parts = torch.stack([part.cpu() for part in self._parts])
        return parts.view(-1, self._layers, *parts.shape[1:])

    def _take(self, layer: int, weights: Tensor) -> None:
        if self._members is None:
            self._kinds = self._prompt()
            self._members = torch.stack([self._kinds == kind for kind in Kind], -1).float()
        self._members = self._members.to(weights.device)  # layers may be spread over devices
        positions = self._members.shape[1]
        passes, expected = divmod(len(self._parts), self._layers)
        self.whole &= layer == expected and weights.shape[-1] == positions + passes
        if not self.whole:
            return
        shares = weights[..., :positions] @ self._members
        shares[..., Kind.ANSWER] += weights[..., positions:].sum(-1)
        self._parts.append(shares)


def lmar(answers: Sequence[Shares], text: Collection[Kind] = TEXTS["all text"]) -> Tensor:
    """Return the layer-wise modality attention ratio of several answers, float64 [layers] (eq. 2).

    Args:
        answers: with at least one image each.
        text: the tokens that image tokens are compared with.
    """
    return torch.stack([answer.ratio(text) for answer in answers]).mean(0)
