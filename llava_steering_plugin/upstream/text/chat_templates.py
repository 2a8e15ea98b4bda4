"""Offer chat formats as LLaVA's conversation templates, under which all of its programs find them."""

from __future__ import annotations

import dataclasses
import functools
from importlib import import_module
from types import ModuleType
from typing import Any

from llava_steering_plugin.components.chat_format import ChatFormat, format_of
from llava_steering_plugin.components.registry import LANGUAGE_MODELS
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.upstream.seams import require

# The template that a base's own tokenizer describes: `--version tokenizer`.
OF_TOKENIZER = "tokenizer"
# The name of this class of templates, which LLaVA's own have not.
_FORMAT = "chat_format"


def on_conversation_import(module: ModuleType) -> None:
    """Add the formats of the registered language models to `llava.conversation.conv_templates`."""
    templates = require(module, "conv_templates")
    for name in LANGUAGE_MODELS.names():
        try:
            formats = LANGUAGE_MODELS.get(name).formats()
        except SteeringError:  # told where the component is asked for
            continue
        for key, written in formats.items():
            templates.setdefault(key, template(module, key, written))


def template(module: ModuleType, name: str, written: ChatFormat) -> Any:
    """Return one of LLaVA's conversation templates that writes a chat format.

    Args:
        module: `llava.conversation`.
    """
    made: Any = _template_class(module)(
        system=written.opening,
        roles=("USER", "ASSISTANT"),
        messages=[],
        offset=0,
        # LLaVA's chat and page stop at `sep` for this style, and at `sep2` for others.
        sep_style=require(module, "SeparatorStyle.MPT"),
        sep=written.end,
        sep2=written.end,
        version=name,
        chat_format=written,
    )
    return made


def offer(tokenizer: Any, whose: str) -> None:
    """Make the template `tokenizer` of LLaVA's that of a tokenizer's own chat template, until another one is offered.

    Where it is one that has a name, it is that one: an adapter then stores the name.

    Raises:
        ArgumentsError: it has none, or one that is no sequence of turns.
    """
    module = import_module("llava.conversation")
    templates = require(module, "conv_templates")
    written = format_of(tokenizer, whose)
    templates.pop(OF_TOKENIZER, None)
    same = [each for each in templates.values() if getattr(each, _FORMAT, None) == written]
    templates[OF_TOKENIZER] = same[0] if same else template(module, OF_TOKENIZER, written)


def offer_if_any(tokenizer: Any, whose: str) -> None:
    """Offer the template of a tokenizer if it has one that can be read; otherwise the name `tokenizer` has none."""
    try:
        offer(tokenizer, whose)
    except SteeringError:  # told where the template is asked for
        require(import_module("llava.conversation"), "conv_templates").pop(OF_TOKENIZER, None)


def is_chat_template(conversation: Any) -> bool:
    """Return whether a conversation is one of `template`."""
    return getattr(conversation, _FORMAT, None) is not None


@functools.cache
def _template_class(module: ModuleType) -> Any:
    conversation = require(module, "Conversation")

    def get_prompt(self: Any) -> str:
        """Write the conversation; of a question with an image, LLaVA's page gives a tuple of its text and that."""
        said = [message[0] if isinstance(message, tuple) else message for _, message in self.messages]
        if self.messages and isinstance(self.messages[0][1], tuple):
            said[0] = "<image>\n" + said[0].replace("<image>", "").strip()
        turns = list(zip(said[::2], [*said[1::2], None], strict=False))
        written = dataclasses.replace(self.chat_format, opening=self.system)
        return str(written.write([(question, answer or None) for question, answer in turns]))

    def copy(self: Any) -> Any:
        return dataclasses.replace(self, messages=[[role, message] for role, message in self.messages])

    made = dataclasses.make_dataclass(
        "ChatTemplate",
        [(_FORMAT, ChatFormat | None, None)],
        bases=(conversation,),
        namespace={"get_prompt": get_prompt, "copy": copy},
    )
    made.__module__ = __name__
    return made
