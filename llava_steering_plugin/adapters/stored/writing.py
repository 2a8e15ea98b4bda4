"""Write an adapter folder. One rename decides: a crash leaves the adapter that was there before, or the new one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llava_steering_plugin.adapters.parameters import flaw
from llava_steering_plugin.adapters.stored.config import AdapterConfig
from llava_steering_plugin.adapters.stored.folder import (
    CARD,
    CONFIG,
    HEADER,
    LLAVA_CONFIG,
    LLAVA_HEADER,
    OLD_CONFIG,
    PEFT_CONFIG,
    WEIGHTS,
    name_in_file,
)
from llava_steering_plugin.errors import AdapterError, listing
from llava_steering_plugin.whole_files import flush, remove_partials


def write_folder(
    folder: str | os.PathLike[str],
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    llava: str,
    card: str,
    peft: str | None = None,
) -> None:
    """Write an adapter: its weights, whose header holds both configs, and after them the copies of what they say.

    Everything is written to a folder below this one and flushed. Then the weights are renamed, which replaces the
    adapter, and the copies follow. Loaders go by the weights alone, so old copies that a crash left mislead none.

    Args:
        folder: created if it is missing. Other files in it stay, but for a config by which PEFT would load it.
        tensors: by full name, with the prefixes of `folder`.
        llava: text of config.json.
        card: text of README.md.
        peft: text of PEFT's config, where PEFT may load the adapter too.

    Raises:
        AdapterError: values are NaN or infinite, the disk is full, or the folder cannot be written; the message says
            which adapter it holds now.
    """
    path = Path(folder)
    if broken := [f"{name}: {found}" for name, tensor in tensors.items() if (found := flaw(tensor))]:
        raise AdapterError(
            listing(
                f"the adapter is not written to {path}, because nothing could be computed with it: the training has "
                "diverged. An adapter that was there before is unharmed. Go on from an earlier checkpoint with a lower "
                "learning rate",
                broken,
            )
        )
    described = config.to_json()
    copies = {CONFIG: described + "\n", LLAVA_CONFIG: llava, CARD: card, **({PEFT_CONFIG: peft} if peft else {})}
    named = {name_in_file(name, config.peft_prefix): tensor for name, tensor in tensors.items()}
    staging = path / f".adapter.{os.getpid()}.partial"
    replaced = False
    try:
        path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        _refuse_folders(path, (WEIGHTS, *copies))
        staging.mkdir()
        _write_weights(staging / WEIGHTS, named, {"format": "pt", HEADER: described, LLAVA_HEADER: llava})
        for name, text in copies.items():
            (staging / name).write_text(text, encoding="utf-8", errors="replace")  # a path may be no text
        # safetensors makes files that only their owner may read; all files of an adapter get the same permissions.
        shutil.copymode(staging / CONFIG, staging / WEIGHTS)
        for name in (WEIGHTS, *copies):
            flush(staging / name)
        os.replace(staging / WEIGHTS, path / WEIGHTS)
        replaced = True
        flush(path)  # the copies must not reach the disk before the weights
        for name in copies:
            os.replace(staging / name, path / name)
        if PEFT_CONFIG not in copies and (path / PEFT_CONFIG).is_file():
            (path / PEFT_CONFIG).unlink()
        flush(path)
    except (OSError, SafetensorError) as error:
        raise AdapterError(_failure(path, error, replaced)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_weights(target: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    # Each tensor gets its own memory: safetensors refuses views that share one.
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, target, header)


def _refuse_folders(path: Path, names: Iterable[str]) -> None:
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
    """Delete what processes that were killed while they wrote an adapter to `folder` have left there.

    Raises:
        OSError: the folder cannot be written.
    """
    # Version 0.1 staged each file by itself.
    remove_partials(folder, ("adapter", WEIGHTS, OLD_CONFIG, LLAVA_CONFIG, CARD))
