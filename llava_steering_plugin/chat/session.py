"""Opens a chat: loads the base through upstream's loader, and the adapters into a pool on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava.mm_utils import get_model_name_from_path

from llava_steering_plugin.adapters.stored.locate import AdapterSource
from llava_steering_plugin.chat.conversation import Chat, template_of_adapter
from llava_steering_plugin.inference.base_model import load_base
from llava_steering_plugin.inference.models import load_adapter_and_base
from llava_steering_plugin.inference.sources import load_all, locate_all
from llava_steering_plugin.pool.pool import BASE
from llava_steering_plugin.upstream.text.conversations import checked_template, template_by_name, template_of_base


def open_chat(
    path: str,
    adapters: Mapping[str, AdapterSource],
    *,
    first: str | None = None,
    base: str | None = None,
    device: str = "cpu",
    load_4bit: bool = False,
    load_8bit: bool = False,
    conversation: str | None = None,
    temperature: float = 0.2,
    max_new_tokens: int = 512,
) -> Chat:
    """Load everything that a chat needs.

    Args:
        path: a model, folder or hub id; or the adapter `first`, which is loaded on the base that it names.
        adapters: folders or hub ids of adapters by name, `first` among them.
        first: the name of the adapter at `path`; None if `path` is a model.
        base: where the base of `first` is, if it has moved.
        conversation: the template for all of them; None: each adapter's own, by the rules of upstream's chat.

    Raises:
        SteeringError: something cannot be loaded; the message lists the problems of all adapters.
    """
    if conversation is not None:
        checked_template(conversation)
    folders = locate_all(adapters)
    how: dict[str, Any] = {"load_4bit": load_4bit, "load_8bit": load_8bit, "device": device}
    if first is None:
        loaded = load_base(path, **how)
        shown = get_model_name_from_path(path)
    else:
        stored = folders.pop(first).read()
        loaded = load_adapter_and_base(first, stored, base, how)
        shown = get_model_name_from_path(base or stored.config.base.name_or_path)
    pool = loaded.pool
    load_all(pool.load, folders)
    templates = {BASE: template_of_base(vars(pool.model.config)) or template_by_name(shown)}
    templates |= {name: template_of_adapter(pool.details(name).conversation, name) for name in adapters}
    return Chat(
        loaded,
        templates if conversation is None else dict.fromkeys(templates, conversation),
        adapter=first or BASE,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
    )
