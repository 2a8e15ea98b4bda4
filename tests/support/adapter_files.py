"""Adapter folders changed by hand: other entries in the header, and the files as version 0.1 wrote them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llava_steering_plugin.adapters.stored.folder import CONFIG, HEADER, LLAVA_CONFIG, LLAVA_HEADER, OLD_CONFIG, WEIGHTS


def header_of(folder: Path) -> dict[str, str]:
    """Return the entries of the weights' header."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return dict(file.metadata())


def set_header(folder: Path, **entries: str | None) -> None:
    """Rewrite the weights with these entries in their header; None removes one."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    header = {key: value for key, value in (header_of(folder) | entries).items() if value is not None}
    save_file(tensors, folder / WEIGHTS, header)


def change_llava_config(folder: Path, **settings: Any) -> Path:
    """Set entries of the LLaVA config that the adapter was trained with."""
    set_header(folder, **{LLAVA_HEADER: json.dumps(json.loads(header_of(folder)[LLAVA_HEADER]) | settings)})
    return folder


def as_version_0_1(folder: Path) -> Path:
    """Turn a folder into what version 0.1 wrote: LLaVA's config in config.json alone, the config under its old name."""
    (folder / LLAVA_CONFIG).write_text(header_of(folder)[LLAVA_HEADER])
    (folder / OLD_CONFIG).write_text(header_of(folder)[HEADER] + "\n")
    (folder / CONFIG).unlink()
    set_header(folder, **{LLAVA_HEADER: None})
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Rewrite the weights with other tensors: `change` gets them by name."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, header_of(folder))
    return folder


def change_settings(folder: Path, *removed: str, **settings: Any) -> Path:
    """Set entries of the mode's settings in the header, and remove others."""
    config = json.loads(header_of(folder)[HEADER])
    config["settings"] = {key: value for key, value in (config["settings"] | settings).items() if key not in removed}
    set_header(folder, **{HEADER: json.dumps(config)})
    return folder
