"""Offer a described tower to LLaVA as its own CLIP tower offers itself."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.components.base import Tower, TowerShape

logger = logging.getLogger(__name__)


class VisionTower(nn.Module):
    """Holds the encoder of a tower, frozen and in evaluation mode, behind the names that LLaVA asks for.

    Args:
        tower: describes it.
        name: as it stands in the flag and in config.json.
        delay_load: build nothing yet. LLaVA makes its model so, and calls `load_model` later.
    """

    def __init__(self, tower: Tower, name: str, delay_load: bool = False):
        super().__init__()
        self._described = tower
        self._shape = tower.shape()
        self.vision_tower_name = name
        self.select_layer, self.select_feature = tower.layer, tower.feature
        self.is_loaded = False
        if not delay_load:
            self.load_model()

    @property
    def tower(self) -> Tower:
        """Return the description. An adapter may bring another layer or feature: it sets the two attributes."""
        if (self._described.layer, self._described.feature) != (self.select_layer, self.select_feature):
            self._described = replace(self._described, layer=self.select_layer, feature=self.select_feature)
            self._shape = self._described.shape()
        return self._described

    @property
    def shape(self) -> TowerShape:
        """Return the sizes."""
        _ = self.tower
        return self._shape

    def load_model(self, device_map: Any = None) -> None:
        """Load the encoder and its image processor; once.

        Args:
            device_map: where to; one that is no single device is left to the caller, who moves the tower.
        """
        if self.is_loaded:
            logger.info("%s is already loaded", self.vision_tower_name)
            return
        self.image_processor = self.tower.image_processor()
        self.vision_tower = self.tower.load().requires_grad_(False).eval()
        if isinstance(device_map, (str, torch.device)) and str(device_map) != "auto":
            self.vision_tower.to(device_map)
        elif device_map is not None and torch.cuda.is_available():
            self.vision_tower.to("cuda")
        self.is_loaded = True

    def train(self, mode: bool = True) -> VisionTower:
        """Leave a frozen encoder in evaluation mode: batch statistics and dropout would change what it sees."""
        super().train(mode)
        if self.is_loaded and not any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            self.vision_tower.eval()
        return self

    @torch.no_grad()
    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Return the tokens of images in their dtype, [images, count, width]; of a list, a list with [1, count, width].

        Args:
            images: [images, 3, image_size, image_size], or a list of [3, image_size, image_size].
        """
        if isinstance(images, list):
            return [self._encoded(image.unsqueeze(0)) for image in images]
        return self._encoded(images)

    def _encoded(self, images: Tensor) -> Tensor:
        pixels = images.to(device=self.device, dtype=self.dtype)
        return self.tower.encode(self.vision_tower, pixels).to(images.dtype)

    @property
    def dummy_feature(self) -> Tensor:
        """Return zeros in the shape of a token, [1, width]."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype in which the encoder computes."""
        return next(parameter.dtype for parameter in self.vision_tower.parameters() if parameter.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Return where the encoder lies."""
        return next(self.vision_tower.parameters()).device

    @property
    def config(self) -> SimpleNamespace:
        """Return the sizes under the names that transformers' configs have for them."""
        tokens = self.shape.tokens
        sizes = SimpleNamespace(image_size=self.shape.image_size, hidden_size=tokens.width)
        if tokens.side is not None:
            sizes.patch_size = self.shape.image_size // tokens.side
        if self.shape.layers is not None:
            sizes.num_hidden_layers = self.shape.layers
        return sizes

    @property
    def hidden_size(self) -> int:
        """Return the width of a token."""
        return self.shape.tokens.width

    @property
    def num_patches_per_side(self) -> int:
        """Return the tokens of a row of the image; of a tower without rows, the root of their number."""
        return self.shape.tokens.side or int(self.shape.tokens.count**0.5)

    @property
    def num_patches(self) -> int:
        """Return how many tokens an image becomes, without those that stand before the patches."""
        return self.shape.tokens.count - self.shape.tokens.leading
