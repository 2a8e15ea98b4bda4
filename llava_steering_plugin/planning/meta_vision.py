"""Build vision tower and projector of a training on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llava_steering_plugin.components.base import Tower
from llava_steering_plugin.planning.meta_memory import META
from llava_steering_plugin.upstream.model.projector import build_projector


class MetaTower(nn.Module):
    """Holds a vision tower on the meta device, and asks it as LLaVA does.

    Args:
        encoder: the modules.
        image_size: side of an image, in pixels.
        component: what it is a tower of; None: LLaVA's own, which is asked for all its hidden states.
    """

    def __init__(self, encoder: nn.Module, image_size: int, component: Tower | None = None):
        super().__init__()
        self.encoder, self.image_size, self.component = encoder, image_size, component

    def pixels(self, images: int) -> Tensor:
        """Return images without values, [images, 3, image_size, image_size]."""
        return torch.empty(images, 3, self.image_size, self.image_size, device=META)

    def forward(self, pixels: Tensor) -> Any:
        """Run the tower on images, [images, 3, image_size, image_size]."""
        dtype = next(self.encoder.parameters()).dtype
        if self.component is None:
            return self.encoder(pixels.to(dtype), output_hidden_states=True)
        return self.component.encode(self.encoder, pixels.to(dtype))


def meta_projector(settings: Any, dtype: torch.dtype) -> nn.Module | None:
    """Return the projector; None where its settings are unknown."""
    if settings is None:
        return None
    with torch.device(META):
        built = build_projector(settings)
    return built.to(dtype)


def meta_tower(described: Tower | Mapping[str, Any] | None, dtype: torch.dtype) -> MetaTower | None:
    """Return the vision tower, frozen; None where it is unknown.

    Args:
        described: a component, or config.json of LLaVA's own.
    """
    if described is None:
        return None
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.modeling_utils import no_init_weights

    with torch.device(META), no_init_weights():
        if isinstance(described, Tower):
            tower = MetaTower(described.build(), described.shape().image_size, described)
        else:
            # A CLIP of both halves keeps the vision tower's settings apart.
            config = CLIPVisionConfig.from_dict(dict(described.get("vision_config") or described))
            tower = MetaTower(CLIPVisionModel(config), config.image_size)
    return tower.to(dtype).requires_grad_(False).eval()
