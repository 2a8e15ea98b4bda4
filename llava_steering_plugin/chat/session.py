"""Opens a chat: loads the base through upstream's loader, and the adapters into a pool on it."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from typing import Any

from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model

from llava_steering_plugin.adapters.attachment import remove_adapter
from llava_steering_plugin.adapters.folder import StoredAdapter
from llava_steering_plugin.adapters.locate import AdapterSource
from llava_steering_plugin.chat.conversation import Chat, template_by_name, template_of_adapter
from llava_steering_plugin.errors import AdapterError, BaseMismatch
from llava_steering_plugin.inference.base_model import described, is_llava, loading, loading_name
from llava_steering_plugin.inference.sources import load_all, locate_all
from llava_steering_plugin.pool.pool import BASE, AdapterPool
from llava_steering_plugin.upstream.conversations import checked_template

logger = logging.getLogger(__name__)

_Loaded = tuple[AdapterPool, Any, Any]  # the pool, the tokenizer, the image processor


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
    """Loads everything that a chat needs.

    Args:
        path: a model, folder or hub id; or the adapter `first`, which is loaded on the base that it knows.
        adapters: folders or hub ids of adapters by name, `first` among them.
        first: the adapter that `path` is; None if it is none.
        base: where the base of `first` is, if not where the adapter knows it to be.
        conversation: the template for everybody; None: each adapter's own, by the rules of upstream's chat.

    Raises:
        SteeringError: something cannot be loaded; all adapters' problems at once.
    """
    if conversation is not None:
        checked_template(conversation)
    folders = locate_all(adapters)
    how = {"load_4bit": load_4bit, "load_8bit": load_8bit, "device": device}
    if first is None:
        pool, tokenizer, processor = _load_base(path, how)
        shown = get_model_name_from_path(path)
    else:
        stored = folders.pop(first).read()
        pool, tokenizer, processor = _load_adapter(first, stored, base, how)
        shown = get_model_name_from_path(base or stored.config.base.name_or_path)
    load_all(pool.load, folders)
    templates = {BASE: template_by_name(shown)}
    templates |= {name: template_of_adapter(pool.details(name).conversation) for name in adapters}
    return Chat(
        pool,
        tokenizer,
        processor,
        templates if conversation is None else dict.fromkeys(templates, conversation),
        adapter=first or BASE,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
    )


def _load_adapter(name: str, stored: StoredAdapter, base: str | None, how: dict[str, Any]) -> _Loaded:
    """Load the base of an adapter, with a pool that holds the adapter."""
    folder, where = stored.folder, base or stored.config.base.name_or_path
    hint = f" It is the base that the adapter in {folder} knows; if it has moved, say where it is with --model-base."
    if is_llava(described(where, "" if base else hint)):
        loaded = _load_base(where, how)
        try:
            loaded[0].load(name, stored)
            return loaded
        except BaseMismatch:
            raise
        except AdapterError as error:
            logger.info("loading %s together with its base: %s", folder, error)
            del loaded
            gc.collect()  # the model goes in circles with its pool; two would not fit
    # It needs more of its base than modules and a projector: loaded as one, the base is left with all of that.
    with loading(str(folder)):
        tokenizer, model, processor, _ = load_pretrained_model(stored, base, "llava", **how)
    remove_adapter(model)
    pool = AdapterPool(model, tokenizer)
    pool.load(name, stored)
    return pool, tokenizer, processor


def _load_base(path: str, how: dict[str, Any]) -> _Loaded:
    name = loading_name(path, described(path))
    with loading(path):
        tokenizer, model, processor, _ = load_pretrained_model(path, None, name, **how)
    return AdapterPool(model, tokenizer), tokenizer, processor
