"""Keeps copies of the adapters that were checked, for the processes of one server that load them later.

A request is checked when it comes, and a worker loads its adapter when its turn comes: in the midst of a pass, where an
error ends the engine. By then a training may have replaced the folder, or somebody deleted it.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
import uuid
from pathlib import Path

from llava_steering_plugin.adapters.stored.folder import WEIGHTS

# Where they are, for all processes of this server on this machine. Nobody else can guess the name.
VARIABLE = "LLAVA_STEERING_VLLM_COPIES"

logger = logging.getLogger("vllm.llava_steering")


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
    """Copy an adapter's file, if there is no copy yet. Where that fails, the folder has to stay as it is."""
    target = copy_of(digest)
    if target is None or (target / WEIGHTS).is_file():
        return
    try:
        target.parent.mkdir(mode=0o700, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=target.parent))
        shutil.copyfile(Path(folder) / WEIGHTS, made / WEIGHTS)
        try:
            made.rename(target)
        except OSError:  # another process was faster
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        logger.warning(
            "%s is not copied (%s): leave it as it is while requests for it wait, or the engine may end.", folder, error
        )


def _delete(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not a fork of it
        shutil.rmtree(folder, ignore_errors=True)
