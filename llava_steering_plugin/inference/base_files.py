"""Checks the files of a base model before anything heavy is imported: torch, transformers and LLaVA take many seconds.

`adapters.base_model.read_config` reads the same config through transformers, for programs that load the model anyway.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_steering_plugin.adapters.stored.folder import WEIGHTS as ADAPTER_WEIGHTS
from llava_steering_plugin.adapters.stored.folder import AdapterFolder
from llava_steering_plugin.adapters.stored.locate import find
from llava_steering_plugin.errors import ArgumentsError, UpstreamError, listing
from llava_steering_plugin.foreign_files import INDEX_BYTES, check_folder, pinned, read_json
from llava_steering_plugin.hub import absent, hub_file

CONFIG = "config.json"
VISION_TOWER = "mm_vision_tower"
# The model type in transformers' layout that `llava-steering export` takes.
EXPORTED = "llava"
# The files of a model's weights in the order in which transformers looks for them; an index names several files.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def is_llava(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json describes a LLaVA, with a vision tower."""
    return VISION_TOWER in config


def of_transformers(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is in the layout of transformers' own classes, with a config for each part."""
    return not is_llava(config) and isinstance(config.get("text_config"), dict)


def no_llava(path: str, config: Mapping[str, Any], advice: str = "") -> ArgumentsError:
    """Return the error for a model without a vision tower, or in another layout, where a LLaVA is needed.

    Args:
        config: its config.json.
        advice: how the base is given, with a leading space.
    """
    if not of_transformers(config):
        return ArgumentsError(
            f"{path} is no LLaVA: its config.json has no {VISION_TOWER}. Adapters for images need the LLaVA that they "
            f"were trained on.{advice}"
        )
    kind = config.get("model_type")
    if kind == EXPORTED:
        what = f"Give the same model in LLaVA's layout; `llava-steering export {path} DST` makes it."
    else:
        what = f"A model of type {kind!r} has no such layout: use it from Python (docs/transformers.md)."
    return ArgumentsError(
        f"{path} is a model of transformers' own class, and LLaVA's programs need LLaVA's layout. {what}{advice}"
    )


def check_base(path: str, advice: str = "") -> dict[str, Any]:
    """Return the config.json of a base, if its files are those of a LLaVA. Of a hub id only the config is looked at.

    Args:
        path: a folder or a hub id.
        advice: how the base is given, for the messages, with a leading space.

    Raises:
        ArgumentsError: it is an adapter, or a model without a vision tower.
        UpstreamError: there is no model, or some of its files are missing or damaged.
        SteeringError: a pipe or a device is among them.
    """
    if find(path) is not None:
        raise ArgumentsError(f"{path} is an adapter, no base. Give it with --adapters.{advice}")
    config = read_base_files(path, advice)
    if not is_llava(config):
        raise no_llava(path, config, advice)
    tower = config[VISION_TOWER]
    check_folder(path, "the base")
    if isinstance(tower, str):
        check_folder(tower, "the vision tower")
    if isinstance(tower, str) and os.path.isabs(tower) and not os.path.exists(tower):
        raise UpstreamError(
            f"the config.json of {path} names a vision tower that is not there: {tower}. Put the tower there, or "
            f"write its present place into {VISION_TOWER}."
        )
    if os.path.isdir(path):
        _check_weights(Path(path))
    return config


def read_base_files(path: str, advice: str = "") -> dict[str, Any]:
    """Return the config.json of a folder, or of a model on the hub.

    Raises:
        UpstreamError: there is none, or it is not the config of a model.
    """
    if os.path.isdir(path):
        file = Path(path) / CONFIG
    elif os.path.exists(path):
        raise UpstreamError(f"{path} is no folder.{advice}")
    else:
        file = _from_hub(path, advice)
    try:
        config = read_json(file)
    except FileNotFoundError as error:
        raise UpstreamError(f"{path} holds no model: it has no {CONFIG}.{advice}") from error
    except (OSError, ValueError) as error:
        raise UpstreamError(f"the {CONFIG} of {path} cannot be read: {error}.{advice}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UpstreamError(f"the {CONFIG} of {path} names no model_type, so it is not the config of a model.{advice}")
    return config


def check_adapters_fit(adapters: Mapping[str, AdapterFolder], base: str, config: Mapping[str, Any]) -> None:
    """Compare what adapters know of their base with the config.json of the base that is given.

    Raises:
        ArgumentsError: some were trained on a model of another size; the message names them all. Or the base is in the
            layout of transformers' own classes.
    """
    if of_transformers(config):
        raise no_llava(base, config)
    here = (config.get("num_hidden_layers"), config.get("hidden_size"))
    if not all(isinstance(number, int) for number in here):
        return
    problems = []
    for name, folder in adapters.items():
        trained_on = folder.config.base
        there = (trained_on.num_layers, trained_on.hidden_size)
        if here != there:
            problems.append(
                f"the adapter {name!r} was trained on {there[0]} layers of width {there[1]} "
                f"({trained_on.name_or_path}); {base} has {here[0]} of width {here[1]}. Give it with its own base."
            )
    if problems:
        raise ArgumentsError(listing("some adapters have another base", problems))


def _from_hub(name: str, advice: str) -> Path:
    try:
        return hub_file(name, CONFIG)
    except Exception as error:  # no name of a model, no such model, no network: each has errors of its own
        raise UpstreamError(absent(name) + advice) from error


def _check_weights(folder: Path) -> None:
    """Check that the files of the weights are there, and that those in safetensors are whole.

    Raises:
        UpstreamError: they are not.
    """
    found = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        hint = " It looks like an unmerged LoRA: merge it into its base first." * (folder / ADAPTER_WEIGHTS).is_file()
        raise UpstreamError(f"{folder} holds no weights: none of {', '.join(WEIGHTS)}.{hint}")
    try:
        names = [found] if not found.endswith(".json") else _indexed(folder / found)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UpstreamError(f"{folder / found} is damaged ({error!r}). Copy the model again.") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UpstreamError(f"{folder} lacks weights: {', '.join(missing)}. Copy the model again.")
    for name in names:
        if name.endswith(".safetensors"):
            _check_whole(folder / name)


def _indexed(index: Path) -> list[str]:
    """Return the names of the files that an index names."""
    return sorted({str(name) for name in read_json(index, INDEX_BYTES)["weight_map"].values()})


def _check_whole(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with (
            pinned(file) as pinned_file,
            safe_open(pinned_file, framework="np"),
        ):  # reads the header, and compares it with the file's length
            pass
    except (OSError, SafetensorError) as error:
        raise UpstreamError(f"{file} is damaged or cut short ({error}). Copy the model again.") from error
