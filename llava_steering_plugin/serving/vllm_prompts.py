"""The chat template with which vLLM's server writes the prompts of a base and its adapters. It has one for all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_steering_plugin.adapters.stored.folder import AdapterFolder
from llava_steering_plugin.components.vllm_template import with_bos
from llava_steering_plugin.errors import AdapterError, UpstreamError, listing
from llava_steering_plugin.foreign_files import read_json, read_text
from llava_steering_plugin.hub import hub_file

# What `llava-steering export` writes, and where others keep it.
TEMPLATE, RECORD = "chat_template.jinja", "llava_export.json"
IN_JSON = ("chat_template.json", "tokenizer_config.json")
# LLaVA has one template under two names.
SAME = {"v1": "vicuna_v1"}


def template_for(base: str, folders: Mapping[str, AdapterFolder]) -> str | None:
    """Return the chat template, with `<s>`, for all of them; None: vLLM's server takes the base's own as it is.

    Args:
        base: a folder or a hub id.
        folders: the adapters by name.

    Raises:
        AdapterError: they were trained with several templates; or with one that cannot be told.
        UpstreamError: the base's template cannot be read.
    """
    own = _own_template(base)
    recorded = _conversation(base)
    found: dict[str | None, list[str]] = {}
    unknown = []
    for name, folder in folders.items():
        config = folder.config
        template = config.chat_template
        if template is None and config.conversation is None:
            template = own
        elif template is None:
            if recorded is None or _one_name(config.conversation) != _one_name(recorded):
                unknown.append(f"{name}: {config.conversation}")
            template = own
        found.setdefault(template, []).append(name)
    if unknown:
        raise AdapterError(
            listing(
                "some adapters were trained with a conversation template that neither they nor the base hold. Export "
                "the base with --conversation and that name",
                unknown,
            )
        )
    if len(found) > 1:
        raise AdapterError(
            listing(
                "the adapters were trained with different conversation templates, and a server of vLLM's has one. "
                "Start one for each of these groups, or serve them with our own worker (without --engine)",
                [", ".join(names) for names in found.values()],
            )
        )
    template = next(iter(found), own)
    return with_bos(template) if template is not None else None


def _one_name(conversation: str | None) -> str | None:
    return SAME.get(conversation or "", conversation)


def _own_template(base: str) -> str | None:
    """Return the chat template in the files of a base; None: there is none.

    Raises:
        UpstreamError: there is one that cannot be read.
    """
    if (file := _file(base, TEMPLATE)) is not None:
        try:
            return read_text(file)
        except (OSError, ValueError) as error:
            raise UpstreamError(f"{file} cannot be read: {error}. Export the base again.") from error
    for name in IN_JSON:
        if isinstance(template := _json(base, name).get("chat_template"), str):
            return template
    return None


def _conversation(base: str) -> str | None:
    """Return the name of LLaVA's template that a base was exported with; None: unknown."""
    described = _json(base, RECORD).get("conversation")
    name = described.get("name") if isinstance(described, dict) else None
    return name if isinstance(name, str) else None


def _json(base: str, name: str) -> dict[str, Any]:
    file = _file(base, name)
    try:
        found = read_json(file) if file is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _file(base: str, name: str) -> Path | None:
    if os.path.isdir(os.path.expanduser(base)):
        file = Path(base).expanduser() / name
    else:
        try:
            file = hub_file(base, name)
        except Exception:  # noqa: BLE001  # no such file, no network: each has errors of its own
            return None
    return file if file.is_file() else None
