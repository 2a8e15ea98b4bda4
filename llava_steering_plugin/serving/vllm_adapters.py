"""Checks the adapters that `serve --engine vllm` is given, before vLLM starts: that takes minutes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from llava_steering_plugin.adapters.stored.folder import AdapterFolder
from llava_steering_plugin.errors import AdapterError, listing
from llava_steering_plugin.inference.sources import load_all
from llava_steering_plugin.modes.mores import MoReS
from llava_steering_plugin.vllm.adapter import linears_and_others, unsupported, unsupported_by
from llava_steering_plugin.vllm.base import other_base


def check_adapters(folders: Mapping[str, AdapterFolder], config: Mapping[str, Any], base: str, name: str) -> bool:
    """Check that vLLM can run the adapters, and that they are of this base, if that is a folder.

    Returns:
        Whether one of them brings a projector of its own.

    Raises:
        AdapterError: some cannot; the message names them all.
    """
    text = config.get("text_config", {})
    here = (text.get("num_hidden_layers"), text.get("hidden_size"))
    projectors = []

    def look(label: str, folder: AdapterFolder) -> None:
        trained_on = folder.config.base
        there = (trained_on.num_layers, trained_on.hidden_size)
        wrong = unsupported_by(folder.config)
        if folder.config.mode == MoReS.name:
            stored = folder.read()
            projectors.extend(linears_and_others(stored)[0])
            wrong = unsupported(stored)
        if None not in here and here != there:
            wrong.append(
                f"it was trained on {there[0]} layers of width {there[1]} ({trained_on.name_or_path}), and {base} has "
                f"{here[0]} of width {here[1]}"
            )
        if not wrong and os.path.isdir(base):
            # What cannot be read of a base is said by vLLM, which reads all of it.
            with suppress(OSError, ValueError, LookupError):
                wrong += filter(None, [other_base(stored, Path(base), base)])
        if label == name:
            wrong.append("it has the name of the base: give another one, NAME=PATH or --model-name")
        if wrong:
            raise AdapterError(listing(f"the adapter {label!r} ({folder})", wrong))

    load_all(look, folders)
    return bool(projectors)
