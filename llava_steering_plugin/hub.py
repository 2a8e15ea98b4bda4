"""Gets files of models on the hub, and notices within seconds if it cannot be reached.

huggingface_hub tries every file six times, which takes 23 seconds without a network, and a command needs several files:
a mistyped folder looks like a name on the hub.
"""

from __future__ import annotations

import difflib
import os
import re
import time
from functools import lru_cache
from pathlib import Path

CONNECT_SECONDS = 5.0
# How long the hub counts as out of reach, or in reach: a server runs for days.
REMEMBERED_SECONDS = 60.0
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def is_reachable() -> bool:
    """Return whether the hub answers at all; asked once a minute. False in huggingface_hub's offline mode."""
    return _answers(int(time.monotonic() // REMEMBERED_SECONDS))


@lru_cache(maxsize=1)
def _answers(minute: int) -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=CONNECT_SECONDS)
    except Exception:  # noqa: BLE001 - requests' or httpx's errors, by huggingface_hub's version; offline mode
        return False
    return True


def hub_file(name: str, file: str) -> Path:
    """Return a file of a model on the hub, which is downloaded; without the hub, what was downloaded before.

    Raises:
        Exception: there is no such model, file or network; huggingface_hub has an error for each.
    """
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, file, local_files_only=not is_reachable()))


def hub_folder(name: str, files: list[str]) -> Path:
    """Return the folder of a model on the hub with those of its files that are there, as `hub_file` does.

    Args:
        files: names or patterns.

    Raises:
        Exception: as `hub_file`.
    """
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=files, local_files_only=not is_reachable()))


def absent(name: str, folder: Path | None = None) -> str:
    """Return why there is no model of a name, and which folder is most like it: a sentence, and a question.

    Args:
        folder: where a relative path begins; None: the current folder.
    """
    said = f"there is no folder {name}"
    if _HUB_ID.fullmatch(name):
        said += ", and no model of that name can be fetched from the hub"
        said += "" if is_reachable() else ", which cannot be reached"
    near = nearest_folder(name, folder)
    return f"{said}." + (f" Did you mean {near}?" if near is not None else "")


def nearest_folder(name: str, folder: Path | None = None) -> str | None:
    """Return the folder whose path is most like a mistyped one; None if none is like it.

    Args:
        folder: where a relative path begins; None: the current folder.
    """
    path = Path(name).expanduser()
    here, found = (Path(path.anchor), Path(path.anchor)) if path.is_absolute() else (folder or Path(), Path())
    for part in path.parts[1:] if path.is_absolute() else path.parts:
        if not os.path.isdir(here / part):
            try:
                known = [each.name for each in os.scandir(here) if each.is_dir()]
            except OSError:
                return None
            similar = difflib.get_close_matches(part, known, n=1)
            if not similar:
                return None
            part = similar[0]
        here, found = here / part, found / part
    return str(found)
