"""A described tower behaves towards LLaVA as LLaVA's own tower does. Covers `components/base.py`, the contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from llava_steering_plugin.components.base import Connector, ImageTokens, Tower, TowerShape
from llava_steering_plugin.components.vision_tower import VisionTower


@dataclass(frozen=True)
class Squares(Tower):
    """Makes a token of each quarter of an image, through a batch norm that must never learn."""

    name: ClassVar[str] = "squares"

    def shape(self) -> TowerShape:
        return TowerShape(28, ImageTokens(4, 8, 2))

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 14, 14), nn.BatchNorm2d(8))

    def load(self) -> nn.Module:
        return self.build()

    def image_processor(self) -> Any:
        return "a processor"

    def encode(self, encoder: nn.Module, pixels: Tensor) -> Tensor:
        encoded: Tensor = encoder(pixels).flatten(2).transpose(1, 2)
        return encoded


def test_a_delayed_tower_knows_its_sizes_and_holds_no_weights() -> None:
    tower = VisionTower(Squares(""), "squares", delay_load=True)
    assert not tower.is_loaded and not list(tower.parameters())
    assert (tower.hidden_size, tower.num_patches, tower.num_patches_per_side) == (8, 4, 2)
    assert (tower.config.image_size, tower.config.patch_size, tower.config.hidden_size) == (28, 14, 8)
    tower.load_model()
    weights = tower.vision_tower
    tower.load_model()  # LLaVA asks twice
    assert tower.vision_tower is weights and tower.image_processor == "a processor"


def test_it_takes_a_batch_and_a_list_in_any_dtype_and_needs_no_gradient() -> None:
    tower = VisionTower(Squares(""), "squares").to(torch.bfloat16)
    assert tower.dtype == torch.bfloat16 and tower.device == torch.device("cpu")
    images = torch.rand(2, 3, 28, 28)
    tokens = tower(images)
    assert tokens.shape == (2, 4, 8) and tokens.dtype == torch.float32 and not tokens.requires_grad
    assert [each.shape for each in tower(list(images))] == [(1, 4, 8)] * 2
    assert tower.dummy_feature.shape == (1, 8)


def test_a_frozen_tower_stays_in_evaluation_mode() -> None:
    tower = VisionTower(Squares(""), "squares").train()
    before = tower.vision_tower[1].running_mean.clone()
    tower(torch.rand(2, 3, 28, 28))
    assert torch.equal(tower.vision_tower[1].running_mean, before)
    tower.vision_tower.requires_grad_(True)
    assert tower.train().vision_tower.training


def test_a_connector_keeps_number_and_places_of_tokens_unless_it_says_otherwise() -> None:
    class Same(Connector):
        name: ClassVar[str] = "same"

        def build(self, tokens: ImageTokens, width: int) -> nn.Module:
            return nn.Linear(tokens.width, width)

    assert Same().tokens(ImageTokens(5, 8, 2, 1), 32) == ImageTokens(5, 32, 2, 1)
    with pytest.raises(TypeError):
        Tower("")  # type: ignore[abstract]
