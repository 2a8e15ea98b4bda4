"""Warn of settings with which a training starts, and which are hardly what was meant."""

from __future__ import annotations

import logging

from llava_steering_plugin.adapters.attachment import Attachment

logger = logging.getLogger(__name__)


def warn_of_settings(attachment: Attachment) -> None:
    """Log what the mode remarks on its settings, given the images that the model reads."""
    find = getattr(attachment.model, "get_vision_tower", None)
    # Of an image, or of each of its tiles.
    tokens = getattr(find() if find else None, "num_patches", None)
    for remark in attachment.mode.remarks(tokens) if tokens else ():
        logger.warning(remark)
