"""Names from which upstream's string rules pick the right loader, multimodality and conversation template.

Upstream decides by substrings of a model's name: 'llava' for a multimodal model, 'v1', 'llama-2', 'mistral',
'v1.6-34b', 'mpt' for the conversation, 'lora' and 'plain' for yet other things. An adapter's folder may have any name,
so what upstream sees is a name made for these rules.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

from llava_steering_plugin.adapters.stored.locate import AdapterSource, find
from llava_steering_plugin.errors import UpstreamError

logger = logging.getLogger(__name__)

# The prefix that makes the rules of upstream's command line and scripts pick each conversation template.
CHAT_PREFIXES = {
    "v1": "llava-v1",
    "vicuna_v1": "llava-v1",
    "llava_v1": "llava-v1",
    "llama_2": "llava-llama-2",
    "llava_llama_2": "llava-llama-2",
    "mistral_instruct": "llava-mistral",
    "chatml_direct": "llava-v1.6-34b",
    "mpt": "llava-mpt",
    "v0": "llava",
    "llava_v0": "llava",
}
# Every substring that some rule of upstream's or a fork's looks for. 'mixlora-pets' must not be taken for a LoRA.
_LOOKED_FOR = re.compile(
    r"llava|lora|llama|mpt|mistral|mixtral|hermes|orca|mmtag|plain|finetune|qwen|quyen|gemma|zephyr|moe|v\d",
    re.IGNORECASE,
)


def display_name(source: AdapterSource, *, checked: bool = True) -> str | None:
    """Return the name under which upstream handles the adapter of that name; None if there is no adapter of ours.

    Args:
        checked: raise where no name leads to the adapter's conversation template. Otherwise warn, and return the name
            that leads to upstream's usual one: programs that ask for a name may not want it for the template.

    Raises:
        AdapterError: the adapter is damaged.
        UpstreamError: `checked`, and upstream has no such name.
    """
    folder = find(source)
    if folder is None:
        return None
    conversation = folder.config.conversation
    prefix = CHAT_PREFIXES.get(conversation or "v0")
    if prefix is None:
        if not any(argument.split("=")[0] in ("--conv-mode", "--conv_mode") for argument in sys.argv):
            advice = (
                f"the adapter in {folder} was trained with the conversation template {conversation!r}, which LLaVA's "
                f"scripts cannot tell from a model's name. Say it: --conv-mode {conversation}; for the model worker, "
                "which has no such flag, give any --model-name."
            )
            if checked:
                raise UpstreamError(advice)
            logger.warning("%s", advice)
        prefix = "llava"
    return f"{prefix}-{harmless(_stem(folder.source))}"


def _stem(name_or_path: str) -> str:
    """Return the folder's name, with its parent's for a checkpoint, as upstream does."""
    path = Path(name_or_path.rstrip("/")).expanduser()
    parts = Path(os.path.abspath(path)).parts if path.is_dir() else path.parts
    return f"{parts[-2]}_{parts[-1]}" if parts[-1].startswith("checkpoint-") and len(parts) > 1 else parts[-1]


def harmless(name: str) -> str:
    """Put a dot inside every word that upstream's rules look for: the name is still readable, and no longer matched."""
    return _LOOKED_FOR.sub(lambda match: f"{match[0][0]}.{match[0][1:]}", name)
