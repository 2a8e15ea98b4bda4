"""Writes a conversation as the model was trained with it: in its own template, images in front of their message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import SeparatorStyle, conv_templates

from llava_steering_plugin.serving.http.openai.errors import ApiError
from llava_steering_plugin.serving.http.openai.schema import Message
from llava_steering_plugin.upstream.text.chat_templates import is_chat_template
from llava_steering_plugin.upstream.text.conversations import marked_as
from llava_steering_plugin.upstream.train.targets import prompt_ids

SYSTEM = ("system", "developer")
CHATML = "<|im_start|>system\n", "<|im_end|>"


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model reads it.

    Attributes:
        ids: of its text, with LLaVA's placeholder for every image, in the order of the images of the messages.
        stop: what the model says at the end of an answer.
    """

    ids: tuple[int, ...]
    stop: str


def write(messages: Sequence[Message], template: str, tokenizer: Any, config: Any) -> Prompt:
    """Write a conversation whose last message is to be answered.

    As in LLaVA's training, the images of a message stand in front of its text, each on a line of its own.

    Args:
        template: the name of one of LLaVA's conversation templates.
        tokenizer, config: of the model that answers.

    Raises:
        ApiError: the messages are no conversation, or the template has no place for one of them (400, all listed).
    """
    conversation = conv_templates[template].copy()
    conversation.messages = []  # some templates hold examples, which no training has seen
    system = messages[0].text if messages[0].role in SYSTEM else None
    turns = list(messages if system is None else messages[1:])
    problems = _problems(messages, turns)
    if system is not None and not _set_system(conversation, system):
        problems.append(f"messages[0]: the template of this model ({template}) has no place for a system message")
    if problems:
        raise ApiError(400, f"The request cannot be answered: {'; '.join(problems)}.", param="messages")
    said = [marked_as(_said(message, "mmtag" in conversation.version), config) for message in turns]
    by_first = conversation.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.MPT)
    stop = (conversation.sep if by_first else conversation.sep2) or ""
    return Prompt(tuple(prompt_ids(said, conversation, tokenizer)), stop)


def _problems(messages: Sequence[Message], turns: Sequence[Message]) -> list[str]:
    """Return what is wrong with the messages; `turns` are those behind the system's."""
    problems = []
    first = len(messages) - len(turns)
    for number, message in enumerate(messages):
        place, role = f"messages[{number}]", message.role
        if DEFAULT_IMAGE_TOKEN in message.text:
            problems.append(f"{place} holds the text {DEFAULT_IMAGE_TOKEN}, which stands for an image")
        if message.images and role != "user":
            problems.append(f"{place} is the {role}'s and holds an image; only the user's may")
        if not message.text.strip() and not message.images and role not in SYSTEM:
            problems.append(f"{place} is empty")
        if number >= first:
            wanted = "assistant" if (number - first) % 2 else "user"
            if role in SYSTEM:
                problems.append(f"{place} is the {role}'s; that has to be the first one, alone")
            elif role != wanted:
                problems.append(f"{place} is the {role}'s; user and assistant speak in turn, the user first")
                break  # of those behind it, every one would be wrong
    if not turns or turns[-1].role != "user":
        problems.append("the last message is not the user's")
    return problems


def _said(message: Message, tagged: bool) -> str:
    if not message.images:
        return message.text
    mark = f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>" if tagged else DEFAULT_IMAGE_TOKEN
    return (f"{mark}\n" * len(message.images) + message.text.strip()).strip()


def _set_system(conversation: Any, text: str) -> bool:
    """Put a system message into a template, inside of the marks around its own; return whether it has a place."""
    own, (begin, end) = str(conversation.system), CHATML
    if own.startswith(begin):
        behind = own.rfind(end)
        conversation.system = begin + text + (own[behind:] if behind >= 0 else "")
        return True
    if is_chat_template(conversation):
        if not own.strip() or "<" in own:  # marks of an unknown kind
            return False
        text += own[len(own.rstrip()) :]
    elif conversation.sep_style == SeparatorStyle.PLAIN:
        return False
    conversation.system = text
    return True
