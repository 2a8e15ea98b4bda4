"""Checks what the command line of a chat and its files tell, before a model is loaded. All that is wrong is said."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava_steering_plugin.adapters.stored.folder import AdapterFolder
from llava_steering_plugin.adapters.stored.locate import AdapterSource, find
from llava_steering_plugin.checkout.find import find_llava
from llava_steering_plugin.errors import ArgumentsError, Problems
from llava_steering_plugin.inference.base_files import check_adapters_fit
from llava_steering_plugin.inference.base_model import read_base_config
from llava_steering_plugin.inference.images import read_image
from llava_steering_plugin.inference.models import moved
from llava_steering_plugin.inference.options import check_bits, choose_device
from llava_steering_plugin.inference.sources import locate_all, read_sources, split_word
from llava_steering_plugin.upstream.text.conversations import checked_template


@dataclass(frozen=True)
class ChatRequest:
    """A chat that can be opened, as far as its files tell.

    Attributes:
        path: the base, folder or hub id; or the adapter `first`.
        adapters: all adapters by name, `first` among them.
        first: the name of the adapter at `path`; None if `path` is a base.
        device: where to load them.
    """

    path: str
    adapters: Mapping[str, AdapterFolder]
    first: str | None
    device: str


def check_chat(
    path: str,
    more: Sequence[str],
    *,
    base: str | None,
    image: str | None,
    device: str,
    load_4bit: bool,
    load_8bit: bool,
    conversation: str | None,
) -> ChatRequest:
    """Check the options of a chat.

    Args:
        path: base or adapter, as the command line gives it.
        more: the words [NAME=]ADAPTER of further adapters.
        base: where the base of the adapter at `path` is, if it has moved.

    Raises:
        SteeringError: something cannot work; the message names all of it.
    """
    problems = Problems()
    with problems.noted():
        find_llava()
        if conversation is not None:
            checked_template(conversation)
    chosen = device
    with problems.noted():
        chosen = choose_device(device)
    with problems.noted():
        check_bits(load_4bit, load_8bit, device)
    if image is not None:
        with problems.noted():
            read_image(os.path.expanduser(image))
    name, source = split_word(path)
    own = None
    with problems.noted():
        own = find(source)
        if name is not None and own is None:
            raise ArgumentsError(
                f"{path}: only adapters can be given a name, and {source} is no adapter. Give a base by its folder or "
                "hub id alone."
            )
    sources: dict[str, AdapterSource] = {**read_sources([*([path] if own is not None else []), *more], problems)}
    first = next(iter(sources), None) if own is not None else None
    if first is not None and own is not None:
        sources[first] = own
    folders = locate_all(sources, problems)
    where, hint = source, ""
    if own is not None and base is not None:
        where = base
    elif own is not None and first in folders:
        where, hint = folders[first].config.base.name_or_path, moved(folders[first])
    if own is None or base is not None or hint:
        with problems.noted():
            check_adapters_fit(folders, where, read_base_config(where, hint))
    problems.raise_any("the chat cannot start")
    return ChatRequest(source, folders, first, chosen)
