"""Saves of an adapter that die at a chosen moment: killed before or after a call, or inside a write.

A template process imports the package once and forks a process for each save. Run as a script only; `KilledSaves`
starts it. It reads lines of JSON, each the arguments of `save`, and answers each with [exit status, moments].
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, full

from llava_steering_plugin.adapters.stored import writing
from llava_steering_plugin.adapters.stored.config import AdapterConfig, BaseModel

# Calls of these modules change files, but for those that only look.
MODULES = ("posix", "_io", "io", "safetensors._safetensors_rust")
LOOKING = {"fspath", "getpid", "kill", "stat", "lstat", "fstat", "scandir", "listdir", "text_encoding"}
KILL_INSIDE = -1  # in place of a moment: while the weights are being written


class KilledSaves:
    """The template process, on this side of its pipes."""

    def __init__(self, cwd: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def save(
        self, folder: Path, number: int, *, die_at: int | None = None, full_at: int | None = None, size: int = 0
    ) -> tuple[int, list[str]]:
        """Write adapter `number` to `folder` in a process of its own; return its exit status and its moments.

        A moment is just before or just after a call that may change files, and goes by the name of the call.

        Args:
            die_at: SIGKILL at the n-th moment, from 0; KILL_INSIDE: as soon as a part of the weights is written.
            full_at: from the n-th moment on, the kernel ends the process (SIGXFSZ) once it writes beyond `size` bytes
                of a file.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(folder), number, die_at, full_at, size]) + "\n")
        self.process.stdin.flush()
        status, moments = json.loads(self.process.stdout.readline())
        return status, moments

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def contents_of(number: int) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, Any]]:
    """Return config, tensors and LLaVA config of an adapter. The numbers differ in everything; from 1000 on, in MB."""
    base = BaseModel(f"/models/{number}", "llava_llama", 64, 4, 700 + number)
    config = AdapterConfig("mores", {"rank": number}, base, f"template {number}")
    tensors = {f"adapter.layers.{layer}.vis.steer_basis": full((number, 64), float(number)) for layer in range(4)}
    if number >= 1000:
        tensors |= {name: full((number, 256), float(number)) for name in tensors}
    return config, tensors, {"model_type": f"llava_{number}", "image_aspect_ratio": f"ratio {number}"}


def write(folder: Path, number: int) -> None:
    """Write adapter `number` in this process."""
    config, tensors, llava = contents_of(number)
    writing.write_folder(folder, config, tensors, json.dumps(llava), f"The card of {number}\n")


def save(folder: str, number: int, die_at: int | None, full_at: int | None, size: int) -> list[str]:
    """Write the adapter and return the moments; see `KilledSaves.save`."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    moments: list[str] = []

    def watch(frame: object, event: str, function: Any) -> None:
        if event not in ("c_call", "c_return") or not _changes_files(function):
            return
        if len(moments) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(moments) == full_at:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        moments.append(function.__name__)

    sys.setprofile(watch)
    try:
        write(Path(folder), number)
    finally:
        sys.setprofile(None)
    return moments


def _changes_files(function: Any) -> bool:
    owner = function.__module__ or type(getattr(function, "__self__", None)).__module__
    return owner in MODULES and function.__name__ not in LOOKING


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        reading, answering = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.write(answering, json.dumps(save(*request)).encode())
                status = 0
            finally:
                os._exit(status)
        os.close(answering)
        if request[2] == KILL_INSIDE:
            _kill_inside(child, Path(request[0]))
        with os.fdopen(reading) as pipe:
            moments = json.loads(pipe.read() or "[]")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(json.dumps([status, moments]) + "\n")
        sys.stdout.flush()


def _kill_inside(child: int, folder: Path) -> None:
    """Kill `child` once a file of its staging folder holds data."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with suppress(FileNotFoundError):
            if any(file.stat().st_blocks for file in folder.glob(".*.partial/*")):
                os.kill(child, signal.SIGKILL)
                return


if __name__ == "__main__":
    serve()
