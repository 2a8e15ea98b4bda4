"""The adapter folder: its files, and how they are read and checked. `locate` finds it, `writing` writes it.

adapter_model.safetensors    everything that decides: the tensors; in the header, the config and LLaVA's config
llava_steering_config.json   a copy of the config, for people
config.json                  a copy of LLaVA's config, for other programs and older versions of this package
README.md                    the model card
adapter_config.json          of PEFT's methods alone: PEFT's config of them
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llava_steering_plugin.adapters.stored.config import AdapterConfig, parse_llava_config
from llava_steering_plugin.adapters.stored.tensor_file import TensorFile, tensor_file
from llava_steering_plugin.errors import AdapterError, listing, shortened
from llava_steering_plugin.foreign_files import CONFIG_BYTES, WEIGHT_BYTES, brief, cut, read_text, readable
from llava_steering_plugin.hub import nearest_folder

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, CONFIG, LLAVA_CONFIG = "adapter_model.safetensors", "llava_steering_config.json", "config.json"
CARD = "README.md"
# PEFT and transformers take a folder with such a file for an adapter of PEFT's. Version 0.1 named our config so.
PEFT_CONFIG = OLD_CONFIG = "adapter_config.json"
# Keys of the header: the config, and LLaVA's config, which adapters of version 0.1 have in config.json alone.
HEADER, LLAVA_HEADER = "llava_steering", "llava_config"

# Prefixes of tensor names in the file: the mode's parameters by host, the base's own parameters that came to differ,
# the embedding rows of added tokens (input, output), and rows by which the base is recognised (rows, ids).
ADAPTER, EXTRA, ADDED, FINGERPRINT = "adapter.", "base.", "added_tokens.", "fingerprint."

# What a tensor may be stored in: the types that models are trained and served in.
FLOATS = ("torch.float32", "torch.float16", "torch.bfloat16", "torch.float64")
# How many values are looked at together.
_PART = 1 << 20


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as read: its config, its tensors by full name, and the folder they come from."""

    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    folder: AdapterFolder

    @property
    def path(self) -> Path:
        return self.folder.path

    def section(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors under a prefix, without it."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}


class AdapterFolder(os.PathLike[str]):
    """An adapter's folder on this machine. What it holds is read when it is asked for, the configs once.

    Attributes:
        path: the folder.
        source: what it was found by: the folder, or the hub id from which it was downloaded.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        source: str | os.PathLike[str] | None = None,
        header: Mapping[str, str] | None = None,
    ):
        self.path = Path(path).expanduser()
        self.source = str(path if source is None else source)
        if header is not None:
            self.header = header

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def header(self) -> Mapping[str, str]:
        """The header of the weights; nothing where there is none."""
        return read_header(self.path / WEIGHTS)

    @cached_property
    def config(self) -> AdapterConfig:
        """The adapter's config, from the header of its weights; the tensors are not read.

        Raises:
            AdapterError: not ours, damaged, or of a newer format.
        """
        text = self.header.get(HEADER)
        if text is None:
            return self.read().config
        return AdapterConfig.from_json(text, f"the header of {self.path / WEIGHTS}")

    @cached_property
    def llava_config(self) -> dict[str, Any] | None:
        """The LLaVA config that the adapter was trained with: from the header, or from config.json if it is older.

        None: it has neither.

        Raises:
            AdapterError: damaged, or not to be read.
        """
        where, text = f"the header of {self.path / WEIGHTS}", self.header.get(LLAVA_HEADER)
        try:
            if text is None:
                where = str(self.path / LLAVA_CONFIG)
                text = read_text(self.path / LLAVA_CONFIG)
        except (FileNotFoundError, IsADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise AdapterError(f"{where} is damaged ({error}). Copy the adapter again.") from error
        return parse_llava_config(text, where)

    def read(self, fits: Callable[[StoredAdapter], None] | None = None) -> StoredAdapter:
        """Read the whole adapter and check everything that can be checked without a model.

        Args:
            fits: is called before any tensor is read, with the adapter as its header describes it: its tensors have
                shapes and types, and no values. Whatever it raises ends the reading.

        Raises:
            AdapterError: not a folder, not ours, not to be read, damaged, of a newer format, with tensors that are not
                finite or no floats.
        """
        weights = self.path / WEIGHTS
        if not is_readable(weights, WEIGHT_BYTES):
            refuse(self.path)
        with ExitStack() as stack:
            with _damage_of(weights):
                file = stack.enter_context(tensor_file(weights))
            if HEADER not in file.metadata:
                refuse(self.path)
            # A folder of its own: what it says comes from the file that the tensors come from, whatever replaces that.
            folder = AdapterFolder(self.path, self.source, file.metadata)
            names = {_own_name(name, folder.config.peft_prefix): name for name in file.tensors}
            described = _described(file)
            outline = StoredAdapter(folder.config, {own: described[name] for own, name in names.items()}, folder)
            problems = {name: wrong for name, value in outline.tensors.items() if (wrong := _wrong_type(name, value))}
            if fits is not None and not problems:
                fits(outline)
            tensors = {}
            for name in names.keys() - problems.keys():
                with _damage_of(weights):
                    tensor = file.read(names[name])
                if wrong := _wrong_values(name, tensor):
                    problems[name] = wrong
                if not problems:  # else it is not kept
                    tensors[name] = tensor
        if problems:
            found = [f"{cut(names[name])}: {problems[name]}" for name in names if name in problems]
            raise AdapterError(listing(f"{weights} is damaged", shortened(found)))
        return StoredAdapter(folder.config, {name: tensors[name] for name in names}, folder)


def is_readable(file: Path, limit: int = CONFIG_BYTES) -> bool:
    """Tell whether there is such a file, of at most `limit` bytes.

    Raises:
        AdapterError: there is one that cannot be read, or must not be: a pipe, a device, one that is too large.
    """
    try:
        return readable(file, limit)
    except OSError as error:
        raise AdapterError(
            f"{file} cannot be read: {error.strerror}. This user must be allowed to read "
            "the adapter's folder and the files in it, and they must be files of an adapter's size."
        ) from error


def read_header(weights: Path) -> dict[str, str]:
    """Read the header of the weights; nothing where there is none that can be read."""
    try:
        with tensor_file(weights) as file:
            return file.metadata
    except (OSError, ValueError):
        return {}


@contextmanager
def _damage_of(weights: Path) -> Iterator[None]:
    """Make one error of what is wrong with a file of weights."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{weights} cannot be read: {error}. The file is damaged or cut short; copy it again."
        ) from error


def _own_name(name: str, peft_prefix: str | None) -> str:
    """Return our name of a tensor in the file; where the mode's have PEFT's names, no other may have ours."""
    if peft_prefix is None:
        return name
    if name.startswith(peft_prefix):
        return ADAPTER + name.removeprefix(peft_prefix)
    return f"?{name}" if name.startswith(ADAPTER) else name


def name_in_file(name: str, peft_prefix: str | None) -> str:
    """Return the name in the file of a tensor that has `name` here."""
    return name if peft_prefix is None or not name.startswith(ADAPTER) else peft_prefix + name.removeprefix(ADAPTER)


def _described(file: TensorFile) -> dict[str, Tensor]:
    """Return a file's tensors on the meta device: with their shapes and types, without values."""
    import torch

    return {
        name: torch.empty(place.shape, dtype=getattr(torch, place.dtype), device="meta")
        for name, place in file.tensors.items()
    }


def _wrong_type(name: str, tensor: Tensor) -> str:
    """Return what is wrong with the name or the type of an adapter's tensor; the empty string if nothing is."""
    import torch

    if not name.startswith((ADAPTER, EXTRA, ADDED, FINGERPRINT)):
        return "unknown kind of tensor"
    if name == FINGERPRINT + "ids":
        right = tensor.dtype == torch.int64 and tensor.dim() == 1
        return "" if right else f"{tensor.dtype} {brief(list(tensor.shape))} where row numbers are expected"
    return "" if str(tensor.dtype) in FLOATS else f"{tensor.dtype} where one of {', '.join(FLOATS)} is expected"


def _wrong_values(name: str, tensor: Tensor) -> str:
    """Return what is wrong with the values of an adapter's tensor."""
    import torch

    if name == FINGERPRINT + "ids":
        return "numbers below 0 where row numbers are expected" if bool((tensor < 0).any()) else ""
    # In parts: what is made for the comparison must not take as much memory as the tensor.
    parts: tuple[Tensor, ...] = torch.split(tensor.reshape(-1), _PART)
    wrong = sum(int((~torch.isfinite(part)).sum()) for part in parts)
    return f"{wrong} of {tensor.numel()} values are NaN or infinite" if wrong else ""


def _config_file(folder: Path) -> Path | None:
    """Return the file with a copy of the config, under its present or its old name."""
    return next((folder / name for name in (CONFIG, OLD_CONFIG) if (folder / name).is_file()), None)


def refuse(path: Path) -> NoReturn:
    """Say why there is no adapter of ours at `path`."""
    if not os.path.isdir(path):
        near = nearest_folder(str(path)) if not os.path.lexists(path) else None
        hint = f" Did you mean {near}?" if near is not None else ""
        raise AdapterError(f"{path} is no folder.{hint} Give the adapter's folder, the one that holds {WEIGHTS}.")
    weights = path / WEIGHTS
    there = is_readable(weights, WEIGHT_BYTES)
    described = _config_file(path)
    if there:
        with _damage_of(weights), tensor_file(weights):
            pass
    if described is not None:
        # Bytes that are no text become marks that are no JSON either; the parser says so.
        with _damage_of(described):
            text = read_text(described, errors="replace")
        AdapterConfig.from_json(text, str(described))
    if there:
        raise AdapterError(f"{weights} is not an adapter of this plugin: its header has no {HEADER!r} entry.")
    if described is not None:
        raise AdapterError(
            f"{path} has {described.name} but no {WEIGHTS}. The weights are missing or were renamed; copy them again."
        )
    checkpoints = sorted(folder.name for folder in path.glob("checkpoint-*") if (folder / WEIGHTS).is_file())
    hint = f" It has {', '.join(checkpoints)}: give one of these." if checkpoints else ""
    raise AdapterError(f"{path} holds no adapter: neither {WEIGHTS} nor {CONFIG} is in it.{hint}")
