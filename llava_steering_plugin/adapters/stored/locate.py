"""Finds the adapter that a folder or a hub id names. It is found once: what is found goes on as an `AdapterFolder`."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from llava_steering_plugin.adapters.stored.config import is_ours
from llava_steering_plugin.adapters.stored.folder import (
    CARD,
    CONFIG,
    HEADER,
    LLAVA_CONFIG,
    OLD_CONFIG,
    WEIGHTS,
    AdapterFolder,
    StoredAdapter,
    is_readable,
    read_header,
    refuse,
)
from llava_steering_plugin.foreign_files import WEIGHT_BYTES, read_json
from llava_steering_plugin.hub import hub_file, hub_folder

# What an adapter may be given as: a folder, a hub id, or what one of the two has led to.
AdapterSource = str | os.PathLike[str] | StoredAdapter


def find(source: AdapterSource) -> AdapterFolder | None:
    """Find the adapter of that name: a folder, or a hub id, which is downloaded. None if it is not ours.

    Files decide, not names. A folder with our config is ours even if the weights are missing, so that the error which
    follows can say so.

    Raises:
        AdapterError: the folder, or a file by which an adapter is known, is there and may not be read.
    """
    if isinstance(source, StoredAdapter):
        return source.folder
    if isinstance(source, AdapterFolder):
        return source
    path = Path(source).expanduser()
    if os.path.isdir(path):  # unlike pathlib's, these two answer also below a folder that is closed to us
        return AdapterFolder(path, source) if _ours(path) else None
    if os.path.exists(path) or str(source).count("/") != 1:
        return None
    return _from_hub(str(source))


def locate(source: AdapterSource) -> AdapterFolder:
    """Find the adapter of that name, as `find` does.

    Raises:
        AdapterError: there is none; says what is there instead.
    """
    found = find(source)
    if found is None:
        assert not isinstance(source, StoredAdapter)
        refuse(Path(source).expanduser())
    return found


def read(source: AdapterSource, fits: Callable[[StoredAdapter], None] | None = None) -> StoredAdapter:
    """Read the adapter of that name, unless it has been read already.

    Args:
        fits: as for `AdapterFolder.read`: ends the reading where the adapter's shapes do not fit.

    Raises:
        AdapterError: as `locate` and `AdapterFolder.read`.
    """
    return source if isinstance(source, StoredAdapter) else locate(source).read(fits)


def _ours(folder: Path) -> bool:
    for name in (CONFIG, OLD_CONFIG):
        if is_readable(folder / name):
            with suppress(OSError, ValueError):  # the weights may say more
                described = read_json(folder / name)
                if isinstance(described, dict) and is_ours(described.get("peft_type")):
                    return True
    return is_readable(folder / WEIGHTS, WEIGHT_BYTES) and HEADER in read_header(folder / WEIGHTS)


def _from_hub(repository: str) -> AdapterFolder | None:
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    for name in (CONFIG, OLD_CONFIG):
        try:
            described = hub_file(repository, name)
        except EntryNotFoundError:
            continue
        except (OSError, HfHubHTTPError, HFValidationError):
            # No such repository, or no network: the caller loads it as what it is, and reports.
            return None
        if _ours(described.parent):
            files = [WEIGHTS, CONFIG, OLD_CONFIG, LLAVA_CONFIG, CARD]
            return AdapterFolder(hub_folder(repository, files), repository)
    return None
