"""Build the projector of LLaVA from its settings, to count it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from llava_steering_plugin.components.named import named_connector
from llava_steering_plugin.upstream.seams import require


def build_projector(settings: Any) -> nn.Module:
    """Return the module that LLaVA puts between vision tower and language model.

    Args:
        settings: an object with `mm_projector_type`, `mm_hidden_size` and `hidden_size`; for a connector that is a
            component also `tokens`, what the vision tower gives.

    Raises:
        ImportError: there is no LLaVA.
        UpstreamError: this LLaVA builds its projector elsewhere.
        ValueError: LLaVA knows no projector of this type.
    """
    connector = named_connector(settings.mm_projector_type)
    if connector is not None:
        return connector.build(settings.tokens, settings.hidden_size)
    module = import_module("llava.model.multimodal_projector.builder")
    projector: nn.Module = require(module, "build_vision_projector")(settings)
    return projector
