"""Writes questions as LLaVA's eval scripts do, with a mark for every image."""

from __future__ import annotations

from typing import Any

from llava_steering_plugin.inference.asking.questions import IMAGE_MARK, Question
from llava_steering_plugin.upstream.text.conversations import marked_as

# The default template of upstream's eval scripts.
CONVERSATION = "llava_v1"


def said(question: Question, config: Any) -> str:
    """Return what the user says: the question, with LLaVA's mark for every image.

    A text without marks gets all of them in front, each on a line of its own, as LLaVA's eval scripts write one.

    Args:
        config: of the model that answers.
    """
    front = "" if IMAGE_MARK in question.text else f"{IMAGE_MARK}\n" * len(question.images)
    return marked_as(front + question.text, config)


def write_prompt(question: Question, template: str, config: Any) -> str:
    """Return a question as upstream's eval scripts write it.

    Args:
        template: the name of one of LLaVA's conversation templates.
        config: of the model that answers.
    """
    from llava.conversation import conv_templates

    conversation = conv_templates[template].copy()
    conversation.append_message(conversation.roles[0], said(question, config))
    conversation.append_message(conversation.roles[1], None)
    return str(conversation.get_prompt())
