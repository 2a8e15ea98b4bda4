"""Writes LLaVA's conversation templates as chat templates in Jinja.

A message's content is a text, or a list of `{"type": "image"}` and `{"type": "text", "text": ...}`: images come first,
each as `<image>` and a line break, as LLaVA's own scripts put them.
"""

from __future__ import annotations

import json
from typing import Any

from llava_steering_plugin.components.chat_format import ChatFormat
from llava_steering_plugin.errors import ArgumentsError

_CONTENT = (
    "{%- macro said(content) -%}"
    "{%- if content is string -%}{{ content }}"
    "{%- else -%}"
    "{%- for part in content if part['type'] == 'image' -%}{{ IMAGE }}{%- endfor -%}"
    "{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{%- set spoken = messages -%}{%- set system = SYSTEM -%}"
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set spoken = messages[1:] -%}{%- set system = said(messages[0]['content']) -%}"
    "{%- endif -%}"
)
_TURNS = (
    "{{ system }}{{ BEGINNING }}"
    "{%- for message in spoken -%}"
    "{%- if message['role'] == 'user' -%}{{ USER }}{{ said(message['content']) }}{{ AFTER_USER }}"
    "{%- else -%}{{ ASSISTANT }}{{ said(message['content']) }}{{ AFTER_ASSISTANT }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ASKING }}{%- endif -%}"
)
_LLAMA_2 = (
    "{%- for message in spoken -%}"
    "{%- if message['role'] == 'user' -%}"
    "{%- if not loop.first -%}{{ SEP }}{%- endif -%}"
    "{{ '[INST] ' }}"
    "{%- if loop.first and system -%}{{ '<<SYS>>\\n' }}{{ system }}{{ '\\n<</SYS>>\\n\\n' }}{%- endif -%}"
    "{{ said(message['content']) }}{{ ' [/INST]' }}"
    "{%- else -%}{{ ' ' }}{{ said(message['content']) }}{{ ' ' }}{{ SEP2 }}{%- endif -%}"
    "{%- endfor -%}"
)
# Of formats that other tokenizers than LLaVA's have (`chat_format.py`).
_FORMAT = (
    "{{ system }}"
    "{%- for message in spoken -%}"
    "{%- if message['role'] == 'user' -%}"
    "{%- if not loop.first -%}{{ BETWEEN }}{%- endif -%}{{ ASK }}{{ said(message['content']) }}{{ ANSWER }}"
    "{%- else -%}{{ LEAD }}{{ said(message['content']) }}{{ END }}{%- endif -%}"
    "{%- endfor -%}"
)


def chat_template(conversation: Any, image: str = "<image>") -> str:
    """Return the chat template that writes the prompts of one of LLaVA's conversation templates.

    Args:
        conversation: the template, a `llava.conversation.Conversation`.
        image: how an image is marked.

    Raises:
        ArgumentsError: its prompts are not those of a chat.
    """
    style = conversation.sep_style.name
    two, one = (conversation.sep, conversation.sep2), (conversation.sep, conversation.sep)
    separators = {"TWO": two, "SINGLE": one, "MPT": one, "LLAMA_2": two}
    if style not in separators or "mmtag" in conversation.version:
        raise ArgumentsError(
            f"a conversation template of the style {style} ({conversation.version}) cannot be written as a chat "
            "template. Name another one with --conversation."
        )
    values = {"IMAGE": f"{image}\n", "SYSTEM": conversation.system}
    if isinstance(written := getattr(conversation, "chat_format", None), ChatFormat):
        values |= {"BETWEEN": written.between, "ASK": written.ask, "ANSWER": written.answer}
        return _filled(_CONTENT + _FORMAT, values | {"LEAD": written.lead, "END": written.end})
    if style == "LLAMA_2":
        return _filled(_CONTENT + _LLAMA_2, values | {"SEP": conversation.sep, "SEP2": conversation.sep2})
    empty = conversation.copy()
    # Some have turns of their own before the user's first.
    beginning = empty.get_prompt().removeprefix(conversation.system)
    colon = "" if style == "MPT" else ":"
    space = colon and f"{colon} "
    user, assistant = conversation.roles
    after_user, after_assistant = separators[style]
    values |= {"BEGINNING": beginning, "USER": user + space, "ASSISTANT": assistant + space}
    values |= {"AFTER_USER": after_user, "AFTER_ASSISTANT": after_assistant, "ASKING": assistant + colon}
    return _filled(_CONTENT + _TURNS, values)


def _filled(template: str, values: dict[str, str]) -> str:
    """Put texts into a template as Jinja's literals, which are escaped as JSON's are."""
    assignments = "".join(f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in values.items())
    # Macros do not see what is set outside of them after they were made.
    return assignments + template
