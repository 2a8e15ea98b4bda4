"""DINOv2 (arXiv 2304.07193): `--vision_tower dinov2:facebook/dinov2-large`.

Images have the size that its processor cuts out, 224 pixels as released, not that of its position embeddings, which are
interpolated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from llava_steering_plugin.components.base import ImageTokens, Tower, TowerShape
from llava_steering_plugin.components.towers.released_files import (
    check_selection,
    clip_processor,
    model_settings,
    number,
    processor_settings,
)
from llava_steering_plugin.errors import ArgumentsError


@dataclass(frozen=True)
class Dinov2(Tower):
    """Describes DINOv2."""

    name: ClassVar[str] = "dinov2"
    summary: ClassVar[str] = "DINOv2"

    def shape(self) -> TowerShape:
        """Return the sizes that config.json and the image processor say."""
        settings = model_settings(self.source, self.name, ("dinov2",))
        where = f"--vision_tower {self.name}:{self.source}"
        prepared = processor_settings(self.source, self.name)
        crop = prepared.get("crop_size")
        image = crop.get("height") if isinstance(crop, dict) else crop
        if type(image) is not int or image < 1:
            raise ArgumentsError(f"{where}: preprocessor_config.json names no crop_size")
        if absent := [key for key in ("image_mean", "image_std") if key not in prepared]:
            raise ArgumentsError(f"{where}: preprocessor_config.json names no {' and no '.join(absent)}")
        return self.shape_at(image, settings, where)

    def shape_at(self, image: int, settings: Any, where: str) -> TowerShape:
        """Return the sizes for images of `image` pixels a side.

        Raises:
            ArgumentsError: patches do not divide it, or there is no such layer or feature.
        """
        patch = number(settings, "patch_size", 16, where)
        layers = number(settings, "num_hidden_layers", 12, where)
        check_selection(self.layer, self.feature, layers, where, has_class=True)
        if image % patch:
            raise ArgumentsError(f"{where}: images of {image} pixels cannot be divided into patches of {patch}")
        side, leading = image // patch, int(self.feature == "cls_patch")
        tokens = ImageTokens(side * side + leading, number(settings, "hidden_size", 768, where), side, leading)
        return TowerShape(image, tokens, layers)

    def build(self) -> nn.Module:
        """Return the encoder without its weights."""
        from transformers import Dinov2Config, Dinov2Model

        settings = dict(model_settings(self.source, self.name, ("dinov2",)))
        encoder: nn.Module = Dinov2Model(Dinov2Config.from_dict(settings))
        return encoder

    def load(self) -> nn.Module:
        """Return the encoder."""
        from transformers import Dinov2Model

        encoder: nn.Module = Dinov2Model.from_pretrained(self.source)
        return encoder

    def image_processor(self) -> Any:
        """Return a processor with DINOv2's mean, deviation and interpolation."""
        return clip_processor(self.shape().image_size, processor_settings(self.source, self.name))

    def encode(self, encoder: nn.Module, pixels: Tensor) -> Tensor:
        """Return the hidden state of the layer, with or without its class token."""
        states: Tensor = encoder(pixels, output_hidden_states=True).hidden_states[self.layer]
        return states if self.feature == "cls_patch" else states[:, 1:]
