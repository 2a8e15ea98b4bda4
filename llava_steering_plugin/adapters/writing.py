"""Write an adapter folder. One rename decides: a crash leaves the adapter that was there before, or the new one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llava_steering_plugin.adapters.config import AdapterConfig
from llava_steering_plugin.adapters.folder import CARD, CONFIG, HEADER, LLAVA_CONFIG, LLAVA_HEADER, OLD_CONFIG, WEIGHTS
from llava_steering_plugin.errors import AdapterError


def write_folder(
    folder: str | os.PathLike[str], config: AdapterConfig, tensors: Mapping[str, Tensor], llava: str, card: str
) -> None:
    """Write an adapter: its weights, whose header holds both configs, and after them the copies of what they say.

    Everything is written beside the old files and flushed. Then the weights are renamed, which replaces the adapter,
    and the copies follow. Loaders go by the weights alone, so copies that a crash has left behind mislead none of them.

    Args:
        folder: created if it is missing. Other files in it stay, but for the config under its old name.
        tensors: by full name, with the prefixes of `folder`.
        llava: text of config.json.
        card: text of README.md.

    Raises:
        AdapterError: the disk is full or the folder cannot be written; the message says which adapter it holds now.
    """
    path = Path(folder)
    described = config.to_json()
    copies = {CONFIG: described + "\n", LLAVA_CONFIG: llava, CARD: card}
    staged = {name: _partial(path, name) for name in (WEIGHTS, *copies)}
    replaced = False
    try:
        path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        _refuse_folders(path, staged)
        _write_weights(staged[WEIGHTS], tensors, {"format": "pt", HEADER: described, LLAVA_HEADER: llava})
        for name, text in copies.items():
            staged[name].write_text(text, encoding="utf-8", errors="replace")  # a path may be no text
        # safetensors makes files that only their owner may read; all files of an adapter get the same permissions.
        shutil.copymode(staged[CONFIG], staged[WEIGHTS])
        for partial in staged.values():
            _flush(partial)
        os.replace(staged[WEIGHTS], path / WEIGHTS)
        replaced = True
        _flush(path)  # the copies must not reach the disk before the weights
        for name in copies:
            os.replace(staged[name], path / name)
        if (path / OLD_CONFIG).is_file():
            (path / OLD_CONFIG).unlink()
        _flush(path)
    except (OSError, SafetensorError) as error:
        raise AdapterError(_failure(path, error, replaced)) from error
    finally:
        for partial in staged.values():
            with suppress(OSError):
                partial.unlink()


def _partial(folder: Path, name: str) -> Path:
    """Return where this process writes the new file `name` until it is renamed."""
    return folder / f".{name}.{os.getpid()}.partial"


def _write_weights(target: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    # Each tensor gets its own memory: safetensors refuses views that share one.
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, target, header)


def _refuse_folders(path: Path, names: Mapping[str, object]) -> None:
    """Raise the error of a rename onto a folder before anything is replaced."""
    for name in names:
        if (path / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path / name))


def _failure(path: Path, error: Exception, replaced: bool) -> str:
    if replaced:
        return (
            f"the adapter is saved to {path}, but a copy of its configs or the model card could not be written: "
            f"{error}. This package loads the new adapter; other programs read old copies until it is saved again."
        )
    return (
        f"the adapter could not be written to {path}: {error}. An adapter that was there before is unharmed. "
        "Free some space or choose another folder, and save again."
    )


def remove_leftovers(folder: Path) -> None:
    """Delete the partial files of processes that were killed while they wrote an adapter to `folder`.

    Raises:
        OSError: the folder cannot be written.
    """
    for path in folder.glob(".*.partial"):
        name, _, process = path.name.removeprefix(".").removesuffix(".partial").rpartition(".")
        known = name in (WEIGHTS, CONFIG, OLD_CONFIG, LLAVA_CONFIG, CARD)
        if known and process.isdigit() and not _runs(int(process)):
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Tell whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _flush(path: Path) -> None:
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
