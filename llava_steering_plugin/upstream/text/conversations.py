"""Look up LLaVA's conversation templates, and write questions about images as its programs do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_steering_plugin.components.model_types import of_llava_type
from llava_steering_plugin.errors import ArgumentsError, nearest
from llava_steering_plugin.upstream.text.chat_templates import OF_TOKENIZER

# llava/serve/cli.py: the first of these that is in a model's name, in this order, decides its template.
_RULES = {
    "llama-2": "llava_llama_2",
    "mistral": "mistral_instruct",
    "v1.6-34b": "chatml_direct",
    "v1": "llava_v1",
    "mpt": "mpt",
}


def checked_template(name: str, adapter: str | None = None) -> str:
    """Return the name of a conversation template, after checking that LLaVA has it.

    Args:
        adapter: the adapter that was trained with it, for the message; None: the user has chosen it.

    Raises:
        ArgumentsError: LLaVA has no template of that name.
        ImportError: LLaVA cannot be imported.
    """
    from llava.conversation import conv_templates

    # That of a tokenizer is there once the tokenizer has been loaded.
    if name not in conv_templates and name != OF_TOKENIZER:
        hint = nearest(name, conv_templates)
        whose = "" if adapter is None else f" of the adapter {adapter!r}"
        raise ArgumentsError(
            f"unknown conversation template {name!r}{whose}: {hint}LLaVA has {', '.join(conv_templates)}"
        )
    return name


def template_of_base(config: Mapping[str, Any]) -> str | None:
    """Return the template that suits a LLaVA by its model type; None if it is not one that a component made.

    Args:
        config: its config.json.
    """
    component = of_llava_type(str(config.get("model_type")))
    return None if component is None else component.version


def template_by_name(model_name: str) -> str:
    """Return the template that upstream's chat uses for a model of that name."""
    return next((template for part, template in _RULES.items() if part in model_name.lower()), "llava_v0")


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
