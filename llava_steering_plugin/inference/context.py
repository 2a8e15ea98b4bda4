"""Counts the tokens of a prompt as the decoder gets them, images included, and says how many it takes.

LLaVA puts the tokens of the images into a prompt and then cuts its end off at `tokenizer_model_max_length`, without a
word: the question is lost, and the model answers something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llava_steering_plugin.components.base import TowerShape
from llava_steering_plugin.components.image_tokens import CONNECTOR, connected, shape_of
from llava_steering_plugin.components.picture_layouts import ASPECT, MERGE, is_anyres

# Kinds of rope_scaling for which max_position_embeddings is the length before it is scaled.
SCALED_AFTERWARDS = ("linear", "dynamic")


@dataclass(frozen=True)
class Context:
    """Says how many tokens a model takes; None where it does not say.

    Attributes:
        positions: prompt and answer together.
        spliced: a prompt with images, which LLaVA cuts there.
    """

    positions: int | None
    spliced: int | None

    @classmethod
    def of(cls, config: Any) -> Context:
        """Read it from the config of a model."""
        positions = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
        scaling = getattr(config, "rope_scaling", None) or {}
        if positions and scaling.get("type", scaling.get("rope_type")) in SCALED_AFTERWARDS:
            positions = int(positions * scaling.get("factor", 1))
        return cls(positions or None, getattr(config, "tokenizer_model_max_length", None) or None)

    def prompt(self, with_images: bool) -> int | None:
        """Return how many tokens a prompt may have, so that the model sees all of it and can answer one token."""
        limits = [self.positions - 1] if self.positions is not None else []
        if with_images and self.spliced is not None:
            limits.append(self.spliced)
        return min(limits, default=None)


class PromptTokens:
    """Counts the tokens of prompts.

    Args:
        config: of the LLaVA.
        shape: sizes of its vision tower; None: the model takes no images.
    """

    def __init__(self, config: Any, shape: TowerShape | None = None):
        self._config, self._shape = config, shape
        self.context = Context.of(config)
        self._of_size = cache(self._tiled)

    @classmethod
    def of_model(cls, model: Any) -> PromptTokens:
        """Count for a model that has been loaded."""
        tower = model.get_vision_tower() if hasattr(model, "get_vision_tower") else None
        return cls(model.config, shape_of(tower, model.config) if tower is not None else None)

    def count(self, ids: Sequence[int], sizes: Sequence[tuple[int, int]]) -> int:
        """Return how many positions a prompt takes.

        Args:
            ids: of the prompt, with LLaVA's placeholder for each image.
            sizes: width and height of the images.
        """
        return len(ids) - len(sizes) + sum(map(self.of_image, sizes))

    def of_image(self, size: tuple[int, int]) -> int:
        """Return how many tokens an image of that size becomes."""
        if is_anyres(getattr(self._config, ASPECT, None)):
            return self._of_size(size)
        return self._of_tile

    @property
    def _of_tile(self) -> int:
        assert self._shape is not None
        return connected(getattr(self._config, CONNECTOR, None), self._shape.tokens, 1).count

    def _tiled(self, size: tuple[int, int]) -> int:
        """Count by LLaVA's own splice, over features of width 1: its layouts of tiles are many."""
        from llava.mm_utils import get_anyres_image_grid_shape

        assert self._shape is not None
        side = self._shape.image_size
        columns, rows = get_anyres_image_grid_shape(size, self._config.image_grid_pinpoints, side)
        tiles = int(columns * rows) + 1
        try:
            return _spliced(self._config, self._shape, torch.zeros(tiles, self._of_tile, 1), size)
        except (AttributeError, TypeError, ValueError, NotImplementedError):  # a fork whose splice asks for more
            return tiles * self._of_tile


def _spliced(config: Any, shape: TowerShape, features: Tensor, size: tuple[int, int]) -> int:
    """Return how many positions LLaVA's splice gives to one image.

    Args:
        features: [tiles, tokens, 1] of its tiles.
    """
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.model.llava_arch import LlavaMetaForCausalLM

    edge = shape.image_size
    # LLaVA asks the config, LLaVA-NeXT the tower itself.
    vision = SimpleNamespace(
        num_patches_per_side=shape.tokens.side, image_size=edge, config=SimpleNamespace(image_size=edge)
    )

    class Counting(LlavaMetaForCausalLM):
        """Has what the splice asks of a model."""

        def get_model(self) -> Any:
            return self.model

        def get_vision_tower(self) -> Any:
            return vision

        def encode_images(self, images: Tensor) -> Tensor:
            return features

    counting = Counting()
    counting.device = torch.device("cpu")
    counting.config = SimpleNamespace(
        mm_patch_merge_type=getattr(config, MERGE, "flat"),
        image_aspect_ratio=getattr(config, ASPECT),
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    counting.model = SimpleNamespace(image_newline=torch.zeros(1), embed_tokens=lambda ids: torch.zeros(len(ids), 1))
    ids = torch.tensor([[IMAGE_TOKEN_INDEX, 0]])
    images = [torch.zeros(len(features), 1, 1, 1)]
    spliced = counting.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images, image_sizes=[size])
    return int(spliced[4].shape[1]) - 1
