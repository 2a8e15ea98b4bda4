"""Loads a model of any kind, ready to answer: a base, an adapter with its base, or an unmerged LoRA with its base."""

from __future__ import annotations

import gc
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_steering_plugin.adapters.attachment import required
from llava_steering_plugin.adapters.stored.folder import PEFT_CONFIG, AdapterFolder, StoredAdapter
from llava_steering_plugin.adapters.stored.locate import find, locate
from llava_steering_plugin.errors import AdapterError, ArgumentsError, BaseMismatch
from llava_steering_plugin.foreign_files import read_json
from llava_steering_plugin.inference.base_files import check_adapters_fit, check_base, is_llava
from llava_steering_plugin.inference.base_model import LoadedBase, load_base, load_with_upstream, read_base_config
from llava_steering_plugin.pool.pool import BASE, AdapterPool

logger = logging.getLogger(__name__)
# What LLaVA's own training writes beside a LoRA: the projector.
LORA_EXTRAS = "non_lora_trainables.bin"


@dataclass(frozen=True)
class AnsweringModel:
    """A model of any kind on its base.

    Attributes:
        loaded: the base with a pool on it.
        adapter: the name in that pool which the model answers by.
        kind: "base", "lora" (LLaVA's own, unmerged), or the full name of the tuning mode.
        base: where the base was loaded from.
    """

    loaded: LoadedBase
    adapter: str
    kind: str
    base: str


def open_model(path: str, base: str | None, how: dict[str, Any]) -> AnsweringModel:
    """Load a model: a LLaVA checkpoint, an adapter of ours, or an unmerged LoRA of LLaVA's own training.

    Args:
        path: folder or hub id.
        base: where the base of an adapter or a LoRA is, if not where its config says.
        how: `device`, `load_4bit`, `load_8bit`.

    Raises:
        SteeringError: it cannot be loaded.
    """
    own = find(path)
    if own is not None:
        stored = own.read()
        where = base or stored.config.base.name_or_path
        loaded = load_adapter_and_base("adapter", stored, base, how)
        return AnsweringModel(loaded, "adapter", loaded.pool.details("adapter").full_name, where)
    peft = Path(path).expanduser() / PEFT_CONFIG
    if peft.is_file():
        where = base or base_of_lora(peft)
        tokenizer, model, processor = load_with_upstream(path, where, "llava-lora", how)
        return AnsweringModel(LoadedBase(AdapterPool(model, tokenizer), tokenizer, processor), BASE, "lora", where)
    return AnsweringModel(load_base(path, only_llava=True, **how), BASE, "base", path)


def is_lora(path: str) -> bool:
    """Return whether a folder holds an unmerged LoRA of LLaVA's own training."""
    folder = Path(path).expanduser()
    return (folder / PEFT_CONFIG).is_file() and (folder / LORA_EXTRAS).is_file() and find(path) is None


def check_model(path: str, base: str | None, *, bases: bool, name: str = "adapter") -> None:
    """Check that a model is there, and that an adapter has the size of its base, before anything is loaded.

    Args:
        path: folder or hub id, as for `open_model`.
        base: where the base of an adapter or a LoRA is, if not where its config says.
        bases: whether it may be a base of its own.
        name: what messages call an adapter.

    Raises:
        SteeringError: it cannot be loaded.
    """
    own = find(path)
    peft = Path(path).expanduser() / PEFT_CONFIG
    if own is not None:
        where = base or own.config.base.name_or_path
        check_adapters_fit({name: own}, where, read_base_config(where, "" if base else moved(own)))
    elif peft.is_file():
        read_base_config(base or base_of_lora(peft))
    elif bases:
        check_base(path)
    elif os.path.isdir(os.path.expanduser(path)):
        raise ArgumentsError(f"{path} is neither an adapter nor an unmerged LoRA.")
    else:
        locate(path)


def base_of_lora(config: Path) -> str:
    """Return the base that a LoRA's config names.

    Raises:
        ArgumentsError: it names none.
    """
    try:
        named = read_json(config).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ArgumentsError(f"{config} cannot be read: {error}") from error
    if not isinstance(named, str) or not named:
        raise ArgumentsError(f"{config} names no base; say where it is with --model-base.")
    return named


def moved(adapter: AdapterFolder) -> str:
    """Return advice on an adapter whose base is not where it says, with a leading space."""
    return f" The adapter in {adapter} names it as its base; if it has moved, say where it is with --model-base."


def load_adapter_and_base(name: str, stored: StoredAdapter, base: str | None, how: dict[str, Any]) -> LoadedBase:
    """Load the base of an adapter, and the adapter into a pool on it under `name`.

    Args:
        base: where the base is, if it has moved.
        how: further arguments of `load_base`.

    Raises:
        SteeringError: base or adapter cannot be loaded.
    """
    folder, where = stored.folder, base or stored.config.base.name_or_path
    if is_llava(read_base_config(where, "" if base else moved(folder))):
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
    # the model stays so when the adapter's modules move to the pool; the base answers with its own parts.
    tokenizer, model, processor = load_with_upstream(stored, base, "llava", how)
    pool = AdapterPool(model, tokenizer, original=required(model).hand_over())
    pool.load(name, stored)
    return LoadedBase(pool, tokenizer, processor)
