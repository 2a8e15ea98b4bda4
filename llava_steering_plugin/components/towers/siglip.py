"""SigLIP (arXiv 2303.15343), and those SigLIP 2 (arXiv 2502.14786) that take images of one size: they are built alike.

`--vision_tower siglip:google/siglip-so400m-patch14-384`. There is no class token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from llava_steering_plugin.components.base import ImageTokens, Tower, TowerShape
from llava_steering_plugin.components.towers.released_files import (
    BICUBIC,
    check_selection,
    model_settings,
    number,
    processor_settings,
)
from llava_steering_plugin.errors import ArgumentsError

KINDS = ("siglip", "siglip_vision_model")
# Those of SigLIP 2 that take one size are of SigLIP's own type.
NAFLEX = ("siglip2", "siglip2_vision_model")
WHY_NOT_NAFLEX = (
    ". This is SigLIP 2 NaFlex: it makes other rows and columns of each image and has to be told which, while LLaVA "
    "gives a tower squares of one size. Take a SigLIP 2 of one size, such as siglip:google/siglip2-base-patch16-256"
)


class SquareSize(dict[str, int]):
    """Holds height and width, and answers LLaVA's question for the shorter side too, which it asks for tiles."""

    def __missing__(self, key: str) -> int:
        if key == "shortest_edge":
            return self["height"]
        raise KeyError(key)


@dataclass(frozen=True)
class Siglip(Tower):
    """Describes SigLIP."""

    name: ClassVar[str] = "siglip"
    summary: ClassVar[str] = "SigLIP and SigLIP 2 of one image size"

    def shape(self) -> TowerShape:
        """Return the sizes that config.json says."""
        settings = self._settings()
        where = f"--vision_tower {self.name}:{self.source}"
        prepared = processor_settings(self.source, self.name)
        image = number(settings, "image_size", 224, where)
        side = image // number(settings, "patch_size", 16, where)
        layers = number(settings, "num_hidden_layers", 12, where)
        check_selection(self.layer, self.feature, layers, where, has_class=False)
        self._check_size(prepared, image, where)
        return TowerShape(image, ImageTokens(side * side, number(settings, "hidden_size", 768, where), side), layers)

    def _settings(self) -> Mapping[str, Any]:
        return model_settings(self.source, self.name, KINDS, dict.fromkeys(NAFLEX, WHY_NOT_NAFLEX))

    def _check_size(self, prepared: Any, image: int, where: str) -> None:
        size = prepared.get("size")
        found = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
        if found != (image, image):
            raise ArgumentsError(
                f"{where}: preprocessor_config.json makes images of {found[0]} x {found[1]} pixels, and config.json "
                f"takes {image} x {image}"
            )

    def build(self) -> nn.Module:
        """Return the encoder without its weights."""
        from transformers import SiglipVisionConfig, SiglipVisionModel

        config = SiglipVisionConfig.from_dict({**self._settings(), "model_type": "siglip_vision_model"})
        encoder: nn.Module = SiglipVisionModel(config)
        return encoder

    def load(self) -> nn.Module:
        """Return the encoder."""
        from transformers import SiglipVisionModel

        encoder: nn.Module = SiglipVisionModel.from_pretrained(self.source)
        return encoder

    def image_processor(self) -> Any:
        """Return SigLIP's own: an image is squeezed into the square, not cut."""
        from transformers import SiglipImageProcessor

        prepared = processor_settings(self.source, self.name)
        side = self.shape().image_size
        processor = SiglipImageProcessor(
            size={"height": side, "width": side},
            resample=prepared.get("resample", BICUBIC),
            image_mean=prepared.get("image_mean"),
            image_std=prepared.get("image_std"),
        )
        # LLaVA reads both, for samples without an image and for tiles.
        processor.size = SquareSize(height=side, width=side)
        processor.crop_size = {"height": side, "width": side}
        return processor

    def encode(self, encoder: nn.Module, pixels: Tensor) -> Tensor:
        """Return the hidden state of the layer, all of it."""
        states: Tensor = encoder(pixels, output_hidden_states=True).hidden_states[self.layer]
        return states
