"""What LLaVA-NeXT makes of images, several images and videos, and the logits behind it: recorded, and computed again.

Weights come from the names of parameters, so that only what LLaVA-NeXT's splice made of a call is on disk: embeddings
[positions, D], which of them hold an image's features, and the last logits with MoReS on.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parents[1] / "golden" / "next"
FAMILIES = ("llama", "qwen")
HIDDEN, VOCABULARY, LAST = 32, 64, 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
IMAGE, SIDE, TILES, FRAMES = -200, 56, 4, 3
# Of each case: the ids of its prompt, and the kind of its pictures.
CASES: dict[str, tuple[list[int], str]] = {
    "one image": ([1, 5, IMAGE, 7, 8, 9], "image"),
    "anyres_max_9": ([1, IMAGE, 6, 7, 8], "tiles"),
    "two images": ([1, IMAGE, 5, 6, IMAGE, 7], "two"),
    "video": ([1, 3, IMAGE, 4, 4], "video"),
}


def fill(parameters: dict[str, nn.Parameter] | dict[str, Tensor]) -> None:
    """Give each parameter values that follow from its name alone."""
    for name, parameter in parameters.items():
        drawn = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(parameter.shape, generator=drawn) * 0.2
        parameter.data.copy_(1 + values if name.endswith("norm.weight") else values)


def is_text(embeddings: Tensor, ids: list[int], table: Tensor) -> Tensor:
    """Return which positions hold the embeddings of the prompt's text, bool [positions], found by their values.

    Args:
        embeddings: [positions, D] that the splice made.
        ids: of the prompt, with IMAGE where images go.
        table: [vocabulary, D], the embeddings of tokens.
    """
    words = [word for word in ids if word != IMAGE]
    found = []
    for position in embeddings:
        found.append(bool(words) and torch.equal(position, table[words[0]]))
        words = words[1:] if found[-1] else words
    assert not words, "not all of the text is there, in its order"
    return torch.tensor(found)
