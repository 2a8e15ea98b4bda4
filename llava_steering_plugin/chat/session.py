"""Opens a chat: loads the base through upstream's loader, and the adapters into a pool on it."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from typing import Any

from llava.mm_utils import get_model_name_from_path

from llava_steering_plugin.adapters.attachment import remove_adapter
from llava_steering_plugin.adapters.folder import StoredAdapter
from llava_steering_plugin.adapters.locate import AdapterSource
from llava_steering_plugin.chat.conversation import Chat, template_by_name, template_of_adapter
from llava_steering_plugin.errors import AdapterError, BaseMismatch
from llava_steering_plugin.inference.base_files import is_llava
from llava_steering_plugin.inference.base_model import (
    LoadedBase,
    load_base,
    load_with_upstream,
    read_base_config,
)
from llava_steering_plugin.inference.sources import load_all, locate_all
from llava_steering_plugin.pool.pool import BASE, AdapterPool
from llava_steering_plugin.upstream.conversations import checked_template

logger = logging.getLogger(__name__)


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
        loaded = _load_adapter(first, stored, base, how)
        shown = get_model_name_from_path(base or stored.config.base.name_or_path)
    pool = loaded.pool
    load_all(pool.load, folders)
    templates = {BASE: template_by_name(shown)}
    templates |= {name: template_of_adapter(pool.details(name).conversation) for name in adapters}
    return Chat(
        loaded,
        templates if conversation is None else dict.fromkeys(templates, conversation),
        adapter=first or BASE,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
    )


def _load_adapter(name: str, stored: StoredAdapter, base: str | None, how: dict[str, Any]) -> LoadedBase:
    """Load the base of an adapter, and the adapter into a pool on it."""
    folder, where = stored.folder, base or stored.config.base.name_or_path
    hint = f" The adapter in {folder} names it as its base; if it has moved, say where it is with --model-base."
    if is_llava(read_base_config(where, "" if base else hint)):
        loaded = load_base(where, **how)
        try:
            loaded.pool.load(name, stored)
            return loaded
        except BaseMismatch:
            raise
        except AdapterError as error:
            logger.info("loading %s together with its base: %s", folder, error)
            del loaded
            gc.collect()  # the model and its pool refer to each other; a second model would not fit beside them
    # This adapter needs more of its base than modules and a projector. Upstream's loader prepares the base for it, and
    # the base stays so when the adapter's modules move to the pool.
    tokenizer, model, processor = load_with_upstream(stored, base, "llava", how)
    remove_adapter(model)
    pool = AdapterPool(model, tokenizer)
    pool.load(name, stored)
    return LoadedBase(pool, tokenizer, processor)
