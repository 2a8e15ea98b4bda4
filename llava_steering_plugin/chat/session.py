"""Opens a chat: loads the base through upstream's loader, and the adapters into a pool on it."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model

from llava_steering_plugin.adapters import folder as files
from llava_steering_plugin.adapters.attachment import remove_adapter
from llava_steering_plugin.adapters.config import AdapterConfig
from llava_steering_plugin.chat.conversation import Chat, template_by_name, template_of_adapter
from llava_steering_plugin.errors import AdapterError, BaseMismatch
from llava_steering_plugin.inference.base_model import described, is_llava, loading, loading_name
from llava_steering_plugin.inference.sources import check_all, load_all
from llava_steering_plugin.pool.pool import BASE, AdapterPool
from llava_steering_plugin.upstream.conversations import checked_template

logger = logging.getLogger(__name__)

_Loaded = tuple[AdapterPool, Any, Any]  # the pool, the tokenizer, the image processor


def open_chat(
    path: str,
    adapters: Mapping[str, str],
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
    check_all(adapters)
    how = {"load_4bit": load_4bit, "load_8bit": load_8bit, "device": device}
    if first is None:
        pool, tokenizer, processor = _load_base(path, how)
        shown = get_model_name_from_path(path)
    else:
        config = files.read_config(files.find(path) or Path(path))
        pool, tokenizer, processor = _load_adapter(path, first, config, base, how)
        shown = get_model_name_from_path(base or config.base.name_or_path)
    load_all(pool.load, {name: source for name, source in adapters.items() if name != first})
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


def _load_adapter(path: str, name: str, config: AdapterConfig, base: str | None, how: dict[str, Any]) -> _Loaded:
    """The base of the adapter at `path`, with a pool that holds it."""
    where = base or config.base.name_or_path
    hint = f" It is the base that the adapter in {path} knows; if it has moved, say where it is with --model-base."
    if is_llava(described(where, "" if base else hint)):
        loaded = _load_base(where, how)
        try:
            loaded[0].load(name, path)
            return loaded
        except BaseMismatch:
            raise
        except AdapterError as error:
            logger.info("loading %s together with its base: %s", path, error)
            del loaded
            gc.collect()  # the model goes in circles with its pool; two would not fit
    # It needs more of its base than modules and a projector: loaded as one, the base is left with all of that.
    tokenizer, model, processor, _ = _loaded(path, base, "llava", how)
    remove_adapter(model)
    pool = AdapterPool(model, tokenizer)
    pool.load(name, path)
    return pool, tokenizer, processor


def _load_base(path: str, how: dict[str, Any]) -> _Loaded:
    tokenizer, model, processor, _ = _loaded(path, None, loading_name(path, described(path)), how)
    return AdapterPool(model, tokenizer), tokenizer, processor


def _loaded(path: str, base: str | None, name: str, how: dict[str, Any]) -> tuple[Any, ...]:
    with loading(path):
        return tuple(load_pretrained_model(path, base, name, **how))
