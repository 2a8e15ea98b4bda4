"""LLaVA's splice in the simplest way, one token at a time: the oracle of the token map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from steered import IGNORED, IMAGE
from torch import Tensor

from llava_steering_plugin.hooks.token_map import TokenMap, spliced


@dataclass
class Batch:
    """What upstream's splice is called with, and the features of its images, one [tokens, width] for each."""

    ids: Tensor
    attention: Tensor | None
    labels: Tensor | None
    images: Any
    features: list[Tensor]
    positions: Tensor | None = None
    sizes: Any = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.ids, self.positions, self.attention, None, self.labels, self.images, self.sizes


@dataclass
class Layout:
    """The spliced sequence as the slow oracle lays it out."""

    embeds: Tensor
    visual: Tensor
    attention: Tensor
    prompt: Tensor
    labels: Tensor


def lay_out(model: Any, batch: Batch) -> Layout:
    """LLaVA's layout, one token at a time: text embeddings, features at placeholders, cut, then padded."""
    embed, config = model.get_input_embeddings(), model.config
    remaining = iter(batch.features)
    rows = []
    for row in range(len(batch.ids)):
        tokens: list[tuple[Tensor, bool, int]] = []
        pieces = batch.ids[row].tolist()
        for place, piece in enumerate(pieces):
            if batch.attention is not None and not batch.attention[row, place]:
                continue
            if piece == IMAGE:
                tokens += [(feature, True, IGNORED) for feature in next(remaining)]
            else:
                label = IGNORED if batch.labels is None else int(batch.labels[row, place])
                tokens.append((embed.weight[piece], False, label))
        if not any(visual for _, visual, _ in tokens):
            next(remaining)  # text-only rows come with a picture that nobody sees
        rows.append(tokens[: config.tokenizer_model_max_length])
    width, length = config.hidden_size, max(len(row) for row in rows)
    shape = (len(rows), length)
    layout = Layout(
        torch.zeros(*shape, width),
        *(torch.zeros(shape, dtype=torch.bool) for _ in range(3)),
        torch.full(shape, IGNORED),
    )
    for row, tokens in enumerate(rows):
        offset = length - len(tokens) if config.tokenizer_padding_side == "left" else 0
        supervised = False
        for place, (vector, visual, label) in enumerate(tokens, offset):
            supervised |= label != IGNORED
            layout.embeds[row, place] = vector
            layout.visual[row, place] = visual
            layout.attention[row, place] = True
            layout.prompt[row, place] = not supervised
            layout.labels[row, place] = label
    return layout


def check(model: Any, batch: Batch) -> TokenMap:
    """The map must be the oracle's, and what the caller gets must be the unwrapped call's, bit for bit."""
    with torch.no_grad():
        unwrapped = model.prepare_inputs_labels_for_multimodal(*batch.arguments)
        result, tokens = spliced(model.prepare_inputs_labels_for_multimodal, *batch.arguments)
        layout = lay_out(model, batch)
    assert tokens is not None
    assert_same(result, unwrapped)
    assert torch.equal(tokens.visual, layout.visual)
    assert torch.equal(tokens.attention, layout.attention)
    assert torch.equal(tokens.prompt, layout.prompt)
    torch.testing.assert_close(result[4], layout.embeds, atol=1e-4, rtol=1e-4)
    if batch.labels is not None:
        assert torch.equal(result[5], layout.labels)
    return tokens


def assert_same(result: Sequence[Any], expected: Sequence[Any]) -> None:
    assert len(result) == len(expected)
    for given_back, unwrapped in zip(result, expected, strict=True):
        if unwrapped is None:
            assert given_back is None
        else:
            assert given_back.dtype == unwrapped.dtype
            assert torch.equal(given_back, unwrapped)
