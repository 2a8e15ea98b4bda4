"""Mixture of features (Eyes Wide Shut, arXiv 2401.06209): CLIP and DINOv2 see the same image.

`--vision_tower mof:openai/clip-vit-large-patch14-336+facebook/dinov2-large`. The features of both lie side by side in
each token; the connector `mof-mlp` interleaves them, as LLaVA-MoF does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava_steering_plugin.components.base import ImageTokens, Tower, TowerShape
from llava_steering_plugin.components.towers.dinov2 import Dinov2
from llava_steering_plugin.components.towers.released_files import (
    check_selection,
    model_settings,
    number,
    processor_settings,
)
from llava_steering_plugin.errors import ArgumentsError


class Both(nn.Module):
    """Holds the two encoders, and turns CLIP's pixels into DINOv2's: they differ in mean and deviation.

    Args:
        scale, shift: [3] each; pixels * scale + shift.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, clip: nn.Module, dino: nn.Module, scale: Tensor, shift: Tensor):
        super().__init__()
        self.clip, self.dino = clip, dino
        # Buffers, so that they move along; they are no weights.
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)

    def for_dino(self, pixels: Tensor) -> Tensor:
        """Return the pixels, [images, 3, height, width], as DINOv2's own processor would have scaled them."""
        return pixels * self.scale + self.shift


@dataclass(frozen=True)
class Mof(Tower):
    """Describes CLIP and DINOv2 together."""

    name: ClassVar[str] = "mof"
    summary: ClassVar[str] = "CLIP and DINOv2, interleaved by the connector mof-mlp (LLaVA-MoF)"

    def _sources(self) -> tuple[str, str]:
        clip, plus, dino = self.source.partition("+")
        if not (clip and plus and dino):
            raise ArgumentsError(
                f"--vision_tower {self.name}:{self.source} needs two sources: {self.name}:CLIP+DINOV2, each a folder "
                "or a name on the hub"
            )
        return clip, dino

    def _dino(self) -> Dinov2:
        return Dinov2(self._sources()[1], self.layer, self.feature)

    def shape(self) -> TowerShape:
        """Return the sizes: both towers must give as many tokens of an image as CLIP takes it.

        Raises:
            ArgumentsError: they do not.
        """
        clip, dino = self._sources()
        where = f"--vision_tower {self.name}:{self.source}"
        seen = model_settings(clip, self.name, ("clip", "clip_vision_model"))
        processor_settings(clip, self.name)
        processor_settings(dino, self.name)
        layers = number(seen, "num_hidden_layers", 12, where)
        check_selection(self.layer, self.feature, layers, f"{where}: CLIP", has_class=True)
        if self.feature != "patch":
            raise ArgumentsError(f"{where}: two class tokens have no common place; --mm_vision_select_feature patch")
        image = number(seen, "image_size", 224, where)
        side = image // number(seen, "patch_size", 32, where)
        other = self._dino().shape_at(image, model_settings(dino, self.name, ("dinov2",)), f"{where}: DINOv2").tokens
        if other.side != side:
            raise ArgumentsError(
                f"{where}: of an image of {image} pixels CLIP makes {side} x {side} tokens and DINOv2 "
                f"{other.side} x {other.side}; take two with patches of one size"
            )
        parts = (number(seen, "hidden_size", 768, where), other.width)
        return TowerShape(image, ImageTokens(side * side, sum(parts), side, parts=parts), layers)

    def build(self) -> nn.Module:
        """Return both encoders without their weights."""
        from transformers import CLIPVisionConfig, CLIPVisionModel

        clip = model_settings(self._sources()[0], self.name, ("clip", "clip_vision_model"))
        config = CLIPVisionConfig.from_dict({**clip, "model_type": "clip_vision_model"})
        return Both(CLIPVisionModel(config), self._dino().build(), *self._rescaling())

    def load(self) -> nn.Module:
        """Return both encoders."""
        from transformers import CLIPVisionModel

        clip, _ = self._sources()
        return Both(CLIPVisionModel.from_pretrained(clip), self._dino().load(), *self._rescaling())

    def image_processor(self) -> Any:
        """Return CLIP's."""
        from transformers import CLIPImageProcessor

        return CLIPImageProcessor.from_pretrained(self._sources()[0])

    def encode(self, encoder: nn.Module, pixels: Tensor) -> Tensor:
        """Return the patches of CLIP and of DINOv2 side by side."""
        assert isinstance(encoder, Both)
        seen = encoder.clip(pixels, output_hidden_states=True).hidden_states[self.layer][:, 1:]
        return torch.cat([seen, self._dino().encode(encoder.dino, encoder.for_dino(pixels))], dim=-1)

    def _rescaling(self) -> tuple[Tensor, Tensor]:
        """Return scale and shift from CLIP's normalised pixels to DINOv2's."""
        clip, dino = (
            [torch.tensor(processor_settings(source, self.name)[key]) for key in ("image_mean", "image_std")]
            for source in self._sources()
        )
        return clip[1] / dino[1], (clip[0] - dino[0]) / dino[1]
