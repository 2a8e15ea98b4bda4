"""Warn of settings with which a training starts, and which are hardly what was meant."""

from __future__ import annotations

import logging

from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.components.image_tokens import of_model

logger = logging.getLogger(__name__)


def warn_of_settings(attachment: Attachment) -> None:
    """Log what the mode remarks on its settings, given the images that the model reads."""
    tokens = of_model(attachment.model)  # of an image, or of each of its tiles
    for remark in attachment.mode.remarks(tokens.count) if tokens else ():
        logger.warning(remark)
