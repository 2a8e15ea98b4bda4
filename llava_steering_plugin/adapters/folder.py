"""The adapter folder: its files, and how it is found, read and validated. `writing` writes it.

adapter_model.safetensors    everything that decides: the tensors; in the header, the config and LLaVA's config
llava_steering_config.json   a copy of the config, for people
config.json                  a copy of LLaVA's config, for other programs and older versions of this package
README.md                    the model card
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_steering_plugin.adapters.config import AdapterConfig, is_ours
from llava_steering_plugin.errors import AdapterError, listing

WEIGHTS, CONFIG, LLAVA_CONFIG = "adapter_model.safetensors", "llava_steering_config.json", "config.json"
CARD = "README.md"
# Version 0.1 named the config so. PEFT and transformers take a folder with such a file for an adapter of PEFT's.
OLD_CONFIG = "adapter_config.json"
# Keys of the header: the config, and LLaVA's config, which adapters of version 0.1 have in config.json alone.
HEADER, LLAVA_HEADER = "llava_steering", "llava_config"

# Prefixes of tensor names in the file: the mode's parameters by host, the base's own parameters that came to differ,
# the embedding rows of added tokens (input, output), and rows by which the base is recognised (rows, ids).
ADAPTER, EXTRA, ADDED, FINGERPRINT = "adapter.", "base.", "added_tokens.", "fingerprint."

# What a tensor may be stored in: the types that models are trained and served in.
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as read: its config, its tensors by full name, and where it came from."""

    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    path: Path

    def section(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}


def find(name_or_path: str | os.PathLike[str]) -> Path | None:
    """The local folder of our adapter of that name: a folder, or a hub id, which is downloaded. None if it is not ours.

    Files decide, not names. A folder with our config is ours even if the weights are missing, so that the error which
    follows can say so.

    Raises:
        AdapterError: the folder, or a file by which an adapter is known, is there and may not be read.
    """
    path = Path(name_or_path).expanduser()
    if os.path.isdir(path):  # unlike pathlib's, these two answer also below a folder that is closed to us
        return path if _ours(path) else None
    if os.path.exists(path) or str(name_or_path).count("/") != 1:
        return None
    return _from_hub(str(name_or_path))


def _ours(folder: Path) -> bool:
    for name in (CONFIG, OLD_CONFIG):
        if _readable(folder / name):
            with suppress(ValueError):
                described = json.loads((folder / name).read_text(encoding="utf-8"))
                if isinstance(described, dict) and is_ours(described.get("peft_type")):
                    return True
    return _readable(folder / WEIGHTS) and _header(folder / WEIGHTS) is not None


def _readable(file: Path) -> bool:
    """Whether there is such a file.

    Raises:
        AdapterError: there is one that cannot be read. safetensors would say that there is none.
    """
    try:
        file.open("rb").close()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return False
    except OSError as error:
        raise AdapterError(
            f"{file} cannot be read: {error.strerror}. Whoever runs this needs to be allowed to read the adapter's "
            "folder and the files in it."
        ) from error
    return True


def _header(weights: Path, key: str = HEADER) -> str | None:
    try:
        with safe_open(weights, framework="pt") as file:
            return (file.metadata() or {}).get(key)
    except (OSError, SafetensorError):
        return None


def _from_hub(repository: str) -> Path | None:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    for name in (CONFIG, OLD_CONFIG):
        try:
            described = Path(hf_hub_download(repository, name))
        except EntryNotFoundError:
            continue
        except (OSError, HfHubHTTPError, HFValidationError):
            # No such repository, or no network: the caller loads it as what it is, and reports.
            return None
        if _ours(described.parent):
            return Path(snapshot_download(repository, allow_patterns=[WEIGHTS, CONFIG, OLD_CONFIG, LLAVA_CONFIG, CARD]))
    return None


def read(folder: str | os.PathLike[str]) -> StoredAdapter:
    """Reads an adapter and checks everything that can be checked without a model.

    Raises:
        AdapterError: not a folder, not ours, not to be read, damaged, of a newer format, with tensors that are not
            finite or no floats.
    """
    path = Path(folder).expanduser()
    weights = path / WEIGHTS
    if not os.path.isdir(path):
        raise AdapterError(f"{path} is no folder. Give the adapter's folder, the one that holds {WEIGHTS}.")
    if not _readable(weights):
        _refuse_without_weights(path)
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(weights, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            if header is not None:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{weights} cannot be read: {error}. The file is damaged or cut short; copy it again."
        ) from error
    if header is None:
        if (described := _config_file(path)) is not None:
            AdapterConfig.from_json(_text(described), str(described))
        raise AdapterError(f"{weights} is not an adapter of this plugin: its header has no {HEADER!r} entry.")
    config = AdapterConfig.from_json(header, f"the header of {weights}")
    problems = []
    for name, tensor in tensors.items():
        if not name.startswith((ADAPTER, EXTRA, ADDED, FINGERPRINT)):
            problems.append(f"{name}: unknown kind of tensor")
        elif name == FINGERPRINT + "ids":
            if tensor.dtype != torch.int64 or tensor.dim() != 1 or bool((tensor < 0).any()):
                problems.append(f"{name}: {tensor.dtype} {list(tensor.shape)} where row numbers are expected")
        elif tensor.dtype not in FLOATS:
            problems.append(f"{name}: {tensor.dtype} where one of {', '.join(map(str, FLOATS))} is expected")
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(
                f"{name}: {int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values are NaN or infinite"
            )
    if problems:
        raise AdapterError(listing(f"{weights} is damaged", problems))
    return StoredAdapter(config, tensors, path)


def _config_file(folder: Path) -> Path | None:
    """Return the file with a copy of the config, under its present or its old name."""
    return next((folder / name for name in (CONFIG, OLD_CONFIG) if (folder / name).is_file()), None)


def _text(path: Path) -> str:
    # Bytes that are no text become marks that are no JSON either; whoever parses it says so.
    return path.read_text(encoding="utf-8", errors="replace")


def read_config(folder: Path) -> AdapterConfig:
    """The config of an adapter folder that `find` gave, without its tensors.

    Raises:
        AdapterError: damaged, or of a newer format.
    """
    header = _header(folder / WEIGHTS)
    return (
        read(folder).config if header is None else AdapterConfig.from_json(header, f"the header of {folder / WEIGHTS}")
    )


def read_llava_config(folder: Path) -> dict[str, Any] | None:
    """Return the LLaVA config that an adapter was trained with: from its header, or from config.json if it is older.

    None: it has neither.

    Raises:
        AdapterError: damaged, or not to be read.
    """
    where, text = f"the header of {folder / WEIGHTS}", _header(folder / WEIGHTS, LLAVA_HEADER)
    try:
        if text is None:
            where = str(folder / LLAVA_CONFIG)
            text = (folder / LLAVA_CONFIG).read_text(encoding="utf-8")
        described = json.loads(text)
        if not isinstance(described, dict):
            raise ValueError("it holds no settings")
    except (FileNotFoundError, IsADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{where} is damaged ({error}). Copy the adapter again.") from error
    return described


def _refuse_without_weights(path: Path) -> None:
    if (described := _config_file(path)) is not None:
        AdapterConfig.from_json(_text(described), str(described))
        raise AdapterError(
            f"{path} has {described.name} but no {WEIGHTS}. The weights are missing or were renamed; copy them again."
        )
    checkpoints = sorted(folder.name for folder in path.glob("checkpoint-*") if (folder / WEIGHTS).is_file())
    hint = f" It has {', '.join(checkpoints)}: give one of these." if checkpoints else ""
    raise AdapterError(f"{path} holds no adapter: neither {WEIGHTS} nor {CONFIG} is in it.{hint}")
