"""Look up LLaVA's conversation templates, and write questions about images as its programs do."""

from __future__ import annotations

from typing import Any

from llava_steering_plugin.errors import ArgumentsError, nearest


def checked_template(name: str, adapter: str | None = None) -> str:
    """Return the name of a conversation template, after checking that LLaVA has it.

    Args:
        adapter: the adapter that was trained with it, for the message; None: the user has chosen it.

    Raises:
        ArgumentsError: LLaVA has no template of that name.
        ImportError: LLaVA cannot be imported.
    """
    from llava.conversation import conv_templates

    if name not in conv_templates:
        hint = nearest(name, conv_templates)
        whose = "" if adapter is None else f" of the adapter {adapter!r}"
        raise ArgumentsError(
            f"unknown conversation template {name!r}{whose}: {hint}LLaVA has {', '.join(conv_templates)}"
        )
    return name


def about_an_image(question: str, config: Any) -> str:
    """Return the first question of a conversation about an image as LLaVA's chat and eval scripts write it.

    Args:
        question: the text of the user.
        config: of the model that answers.
    """
    from llava.constants import DEFAULT_IMAGE_TOKEN

    return f"{marked_as(DEFAULT_IMAGE_TOKEN, config)}\n{question}"


def marked_as(prompt: str, config: Any) -> str:
    """Return a prompt with its marks for images as the model was trained with them.

    Args:
        config: of the model.
    """
    from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN

    if not getattr(config, "mm_use_im_start_end", False):
        return prompt
    return prompt.replace(DEFAULT_IMAGE_TOKEN, DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN)
