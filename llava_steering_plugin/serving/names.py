"""Names of adapters in the web page's drop-down, from which the page picks each adapter's own conversation template.

Upstream's page decides by substrings, like its chat, but with rules of its own: a name without 'llava' means
`vicuna_v1`, which is what LLaVA-1.5's `--version v1` trains with, and one with 'llava' never does. So the prefixes here
are not those of `upstream.naming`, which serve the chat. Upstream main and its wheel have the same rules.
"""

from __future__ import annotations

import re
from pathlib import Path

from llava_steering_plugin.errors import AdapterError, ArgumentsError
from llava_steering_plugin.upstream.naming import harmless

# The beginning of a name that makes the rules of gradio_web_server.py pick each conversation template.
PREFIXES = {
    "v1": "",
    "vicuna_v1": "",
    "llava_v1": "llava-v1-",
    "llava_v0": "llava-",
    "llama_2": "llama-2-",
    "llava_llama_2": "llava-llama-2-",
    "mistral_instruct": "llava-mistral-",
    "chatml_direct": "llava-v1.6-34b-",
    "mistral_direct": "llava-v1.6-34b-",
    "mpt": "llava-mpt-",
    "v1_mmtag": "llava-v1-mmtag-",
    "v0_mmtag": "llava-mmtag-",
}
# What an adapter may be called. Names travel in JSON, in logs and in URLs, and are never made into paths.
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def checked_label(name: str) -> str:
    """The name, if it may be one.

    Raises:
        ArgumentsError: it may not.
    """
    if not _LABEL.fullmatch(name):
        raise ArgumentsError(
            f"{name!r} cannot be the name of an adapter: up to 100 letters, digits, '.', '_' and '-', the first a "
            "letter or digit. Give it another one: NAME=PATH."
        )
    return name


def label_of(name_or_path: str) -> str:
    """The name that an adapter gets from where it is: its folder's, with the parent's for a checkpoint.

    Raises:
        ArgumentsError: that cannot be a name.
    """
    parts = Path(name_or_path).expanduser().resolve().parts if Path(name_or_path).is_dir() else Path(name_or_path).parts
    last = parts[-1] if parts else ""
    return checked_label(f"{parts[-2]}_{last}" if last.startswith("checkpoint-") and len(parts) > 1 else last)


def shown_name(name: str, conversation: str | None, base: str) -> str:
    """The name under which the adapter `name` is registered, so that the page prompts it as it was trained.

    Args:
        conversation: its conversation template; None if unknown: then it is prompted like the base.
        base: the name under which the base is registered.

    Raises:
        AdapterError: the page has no name for this template.
    """
    if conversation is None:
        # All that the rules find in the base's name, they find in this one.
        return f"{base}_{harmless(name)}"
    prefix = PREFIXES.get(conversation)
    if prefix is None:
        raise AdapterError(
            f"the adapter {name!r} was trained with the conversation template {conversation!r}, which LLaVA's web "
            f"page cannot pick from a model's name; it would prompt it wrongly. The page knows {', '.join(PREFIXES)}."
        )
    return prefix + harmless(name)
