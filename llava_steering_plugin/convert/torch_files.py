"""Reads tensors that other programs wrote, one by one, without running anything in their files.

A torch `.bin` file is a pickle, and unpickling runs what the file says. torch's weights-only reader knows tensors and
plain containers and refuses everything else; before torch 2.6 it could be tricked (CVE-2025-32434).
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.torch_version import TorchVersion

from llava_steering_plugin.errors import AdapterError
from llava_steering_plugin.foreign_files import CONFIG_BYTES, INDEX_BYTES, cut, pinned, read_json

SAFE_SINCE = "2.6"

# What a folder may keep its weights in, the preferred one first: in one file, or in several with an index.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"

# A damaged file fails wherever its first wrong byte happens to be read.
_DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
    MemoryError,
    zipfile.BadZipFile,
)


def unpickled(path: Path, *allowed: type) -> Any:
    """Read what torch.save wrote to `path`, with tensors on the CPU and mapped from the file where its format allows.

    Args:
        path: the file.
        allowed: classes that it may hold beside tensors and plain containers. They must be harmless to build.

    Raises:
        AdapterError: missing, damaged, holding anything else, or this torch cannot open it safely.
    """
    if TorchVersion(torch.__version__) < SAFE_SINCE:
        raise AdapterError(
            f"{path} is a pickle, which only torch {SAFE_SINCE} or newer opens without running code that may be in it; "
            f"this is torch {torch.__version__}. Convert where a newer torch is installed: the result opens anywhere."
        )
    try:
        with pinned(path) as pinned_path, torch.serialization.safe_globals(list(allowed)):
            zipped = _check_zip(pinned_path)
            return torch.load(pinned_path, map_location="cpu", weights_only=True, mmap=zipped)
    except FileNotFoundError as error:
        raise AdapterError(f"{path} is missing. Copy the checkpoint again, with all its files.") from error
    except _DAMAGE as error:
        # torch's own text advises to open the file unsafely: it goes no further than the traceback.
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise AdapterError(
                f"{path} holds {refused[1]}, which is no tensor: opening it could run whatever its author wants, so it "
                "was not opened. No checkpoint of the authors' holds that; get the file from its source again."
            ) from error
        reason = f"{type(error).__name__}: {error.strerror}" if isinstance(error, OSError) else type(error).__name__
        raise AdapterError(
            f"{path} cannot be read ({reason}); it is damaged, cut short or closed to you. Copy it again from where it "
            "came from."
        ) from error


def _check_zip(path: str) -> bool:
    """Tell whether a file is a zip archive.

    Raises:
        BadZipFile: parts of it are compressed, which torch.save never does: a few bytes may become gigabytes.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise zipfile.BadZipFile("compressed")
    return True


def tensors_in(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a `.bin` file.

    Raises:
        AdapterError: as `unpickled`, or not a table of tensors.
    """
    found = unpickled(path)
    if not (isinstance(found, Mapping) and all(isinstance(name, str) for name in found)):
        raise AdapterError(f"{path} holds a {type(found).__name__} where a table of named tensors is expected.")
    if others := [name for name, value in found.items() if not isinstance(value, Tensor)]:
        raise AdapterError(f"{path} holds entries that are no tensors: {cut(', '.join(others[:5]))}.")
    if hollow := [name for name, value in found.items() if not _is_whole(value)]:
        raise AdapterError(
            f"{path} holds tensors that are larger than what is stored of them: {cut(', '.join(hollow[:5]))}. Copy it "
            "again from where it came from."
        )
    return dict(found)


def _is_whole(tensor: Tensor) -> bool:
    """Tell whether every number of a tensor is stored: one that repeats a few may claim any size."""
    if tensor.layout != torch.strided:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def namespace_in(path: Path) -> dict[str, Any]:
    """Read the arguments that a `.bin` file keeps as a SimpleNamespace.

    Raises:
        AdapterError: as `unpickled`, or anything else is in it.
    """
    found = unpickled(path, SimpleNamespace)
    if not isinstance(found, SimpleNamespace):
        raise AdapterError(f"{path} holds a {type(found).__name__} where a table of arguments is expected.")
    return vars(found)


def json_in(path: Path, limit: int = CONFIG_BYTES) -> Any:
    """Parse a JSON file of at most `limit` bytes.

    Raises:
        AdapterError: missing or damaged.
    """
    try:
        return read_json(path, limit)
    except FileNotFoundError as error:
        raise AdapterError(f"{path} is missing. Copy the checkpoint again, with all its files.") from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}. Copy it again from where it came from.") from error


class Weights(Mapping[str, Tensor]):
    """A model's tensors by name, read from the files of its folder when they are asked for.

    Args:
        folder: as named in errors.
        files: the file of each tensor.
    """

    def __init__(self, folder: Path, files: Mapping[str, Path]):
        self.folder, self._files = folder, files
        self._opened: dict[Path, Any] = {}

    @classmethod
    def of(cls, folder: Path) -> Weights | None:
        """Find the weights in `folder`; None if it holds none.

        Raises:
            AdapterError: an index or a file is damaged or missing.
        """
        for name in WEIGHT_FILES:
            if (folder / name).exists():
                weights = cls(folder, {})
                weights._files = dict.fromkeys(weights._open(folder / name).keys(), folder / name)
                return weights
            if (folder / (name + INDEX)).exists():
                return cls(folder, _indexed(folder / (name + INDEX)))
        return None

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, name: str) -> Tensor:
        path = self._files[name]
        opened = self._open(path)
        try:
            tensor: Tensor = opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
        except (KeyError, OSError, SafetensorError) as error:
            raise AdapterError(f"{path} lacks {name} or is damaged. Copy it again from where it came from.") from error
        return tensor

    def file_of(self, name: str) -> Path:
        """Return the file in which a tensor lies."""
        return self._files[name]

    def close(self) -> None:
        """Let go of the files; one that is asked for again is opened again."""
        self._opened.clear()

    def _open(self, path: Path) -> Any:
        if path not in self._opened:
            self._opened[path] = _safetensors(path) if path.suffix == ".safetensors" else tensors_in(path)
        return self._opened[path]


def _safetensors(path: Path) -> Any:
    try:
        with pinned(path) as pinned_path:
            return safe_open(pinned_path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{path} is missing, damaged or cut short ({error}). Copy it again from where it came from."
        ) from error


def _indexed(index: Path) -> dict[str, Path]:
    data = json_in(index, INDEX_BYTES)
    listed = data.get("weight_map") if isinstance(data, dict) else None
    # A shard is named by its file name alone; a path could point anywhere.
    if not isinstance(listed, dict) or not all(Path(str(file)).name == file for file in listed.values()):
        raise AdapterError(f"{index} has no usable weight_map. Copy the checkpoint again.")
    if absent := sorted({file for file in listed.values() if not (index.parent / file).is_file()}):
        raise AdapterError(f"{index.parent} lacks {', '.join(absent)}, which {index.name} lists. Copy it again.")
    return {str(name): index.parent / file for name, file in listed.items()}
