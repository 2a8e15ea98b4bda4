"""The conversation templates that LLaVA has, and how its programs write that a question is about an image."""

from __future__ import annotations

from typing import Any

from llava_steering_plugin.errors import ArgumentsError, nearest


def checked_template(name: str) -> str:
    """The name of a template.

    Raises:
        ArgumentsError: LLaVA has none of that name.
        ImportError: there is no LLaVA to ask.
    """
    from llava.conversation import conv_templates

    if name not in conv_templates:
        hint = nearest(name, conv_templates)
        raise ArgumentsError(f"unknown conversation template {name!r}: {hint}LLaVA has {', '.join(conv_templates)}")
    return name


def about_an_image(question: str, config: Any) -> str:
    """The first question of a conversation about an image, as upstream's chat and eval scripts write it.

    Args:
        config: of the model that is asked.
    """
    from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN

    mark = DEFAULT_IMAGE_TOKEN
    if getattr(config, "mm_use_im_start_end", False):
        mark = DEFAULT_IM_START_TOKEN + mark + DEFAULT_IM_END_TOKEN
    return f"{mark}\n{question}"
