"""Keeps copies of the adapters that were checked, for the processes of one server that load them later.

A request is checked when it comes, and a worker loads its adapter when its turn comes: in the midst of a pass, where an
error ends the engine. By then a training may have replaced the folder, or somebody deleted it.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import shutil
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

from llava_steering_plugin.adapters.stored.folder import WEIGHTS
from llava_steering_plugin.errors import AdapterError
from llava_steering_plugin.foreign_files import WEIGHT_BYTES, opened

# Where they are, for all processes of this server on this machine. Nobody else can guess the name.
VARIABLE = "LLAVA_STEERING_VLLM_COPIES"

logger = logging.getLogger("vllm.llava_steering")


def digest_of(folder: str | os.PathLike[str]) -> str:
    """Return the hash of an adapter's weights and config, which are one file: 32 hexadecimal digits.

    Raises:
        AdapterError: the file cannot be read.
    """
    weights = Path(folder) / WEIGHTS
    found = hashlib.sha256()
    try:
        with opened(weights, WEIGHT_BYTES) as file:
            while part := file.read(1 << 20):
                found.update(part)
    except OSError as error:
        raise AdapterError(f"{weights} cannot be read: {error}. Copy the adapter again.") from error
    return found.hexdigest()[:32]


def name_folder() -> None:
    """Choose the folder for this process and those that it will start; it is made for the first copy.

    It is deleted when this process ends, unless another one has chosen it.
    """
    if VARIABLE not in os.environ:
        folder = Path(tempfile.gettempdir()) / f"llava-steering-vllm-{uuid.uuid4().hex}"
        os.environ[VARIABLE] = str(folder)
        atexit.register(_delete, folder, os.getpid())


def copy_of(digest: str) -> Path | None:
    """Return where the copy of an adapter is, or would be; None in a process that no server has started."""
    folder = os.environ.get(VARIABLE)
    return Path(folder) / digest if folder else None


def copy(folder: str | os.PathLike[str], digest: str) -> None:
    """Copy an adapter's file, if there is no copy yet. Where that fails, the folder has to stay as it is.

    Raises:
        AdapterError: the file has another hash by now.
    """
    target = copy_of(digest)
    if target is None or (target / WEIGHTS).is_file():
        return
    try:
        target.parent.mkdir(mode=0o700, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=target.parent))
        try:
            shutil.copyfile(Path(folder) / WEIGHTS, made / WEIGHTS)
            if digest_of(made) != digest:
                raise AdapterError(f"{folder} changed while it was copied: something is writing to it. Load it again.")
            with suppress(OSError):  # another process was faster
                made.rename(target)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        logger.warning(
            "%s is not copied (%s): leave it as it is while requests for it wait, or the engine may end.", folder, error
        )


def _delete(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not a fork of it
        shutil.rmtree(folder, ignore_errors=True)
