"""Writes an adapter folder so that a crash leaves the old adapter or the new one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llava_steering_plugin.adapters.config import AdapterConfig
from llava_steering_plugin.adapters.folder import CARD, CONFIG, HEADER, LLAVA_CONFIG, WEIGHTS
from llava_steering_plugin.errors import AdapterError


def write_folder(
    folder: str | os.PathLike[str], config: AdapterConfig, tensors: Mapping[str, Tensor], llava: str, card: str
) -> None:
    """Writes an adapter folder: everything beside the old files first, then one rename for each.

    Args:
        folder: created if need be; other files in it stay.
        tensors: by full name, with the prefixes of this module.
        llava: text of config.json.
        card: text of README.md.

    Raises:
        AdapterError: the disk is full or the folder cannot be written; what was there before is as it was.
    """
    path = Path(folder)
    described = config.to_json()
    header = {"format": "pt", HEADER: described}

    def weights(target: Path) -> None:
        # Each tensor its own memory: safetensors refuses views that share one.
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, target, header)

    writers: dict[str, Callable[[Path], object]] = {
        WEIGHTS: weights,
        CONFIG: lambda target: target.write_text(described + "\n", encoding="utf-8"),
        LLAVA_CONFIG: lambda target: target.write_text(llava, encoding="utf-8"),
        CARD: lambda target: target.write_text(card, encoding="utf-8"),
    }
    staged = {name: path / f".{name}.{os.getpid()}.partial" for name in writers}
    try:
        path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        for name, writer in writers.items():
            writer(staged[name])
            _flush(staged[name])
        # safetensors makes files that only their owner may read; a shared folder's adapter is for all who may read it.
        shutil.copymode(staged[CONFIG], staged[WEIGHTS])
        # The weights last: until they are replaced, the adapter is the one that was there before.
        for name in (*(staged.keys() - {WEIGHTS}), WEIGHTS):
            os.replace(staged[name], path / name)
        _flush(path)
    except (OSError, SafetensorError) as error:
        for partial in staged.values():
            with suppress(OSError):
                partial.unlink()
        raise AdapterError(
            f"the adapter could not be written to {path}: {error}. An adapter that was there before is "
            "unharmed. Free some space or choose another folder, and save again."
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Deletes what processes that were killed while they wrote an adapter have left in `folder`.

    Raises:
        OSError: the folder cannot be written.
    """
    for path in folder.glob(".*.partial"):
        name, _, process = path.name.removeprefix(".").removesuffix(".partial").rpartition(".")
        if name in (WEIGHTS, CONFIG, LLAVA_CONFIG, CARD) and process.isdigit() and not _runs(int(process)):
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _flush(path: Path) -> None:
    """Forces a file or folder to disk: a rename must not reach the disk before what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
