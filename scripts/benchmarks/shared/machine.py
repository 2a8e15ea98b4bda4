"""Describe the machine that a benchmark runs on, and choose its GPU."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

# Numbers of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
VISIBLE = "CUDA_VISIBLE_DEVICES"


def machine() -> dict[str, Any]:
    """Return what a figure depends on besides the code."""
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load at start": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def prepare(threads: int, dtype: str, quick: bool) -> dict[str, Any]:
    """Set the number of torch threads; return `machine()` with the conditions of the run.

    Processor time is measured with one thread, wall-clock time with several.
    """
    torch.set_num_threads(threads)
    clock = "processor time" if threads == 1 else "wall clock"
    return {**machine(), "clock": clock, "dtype": dtype, "quick": quick}


def keep_freed_memory() -> None:
    """Have the C library keep the memory that is freed, for tensors of up to 32 MB: nothing where it is not glibc.

    Otherwise some steps get pages from the system that others find ready: up to 1 % of their processor time, by chance.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    if change is not None:
        change(_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        change(_TRIM_THRESHOLD, 1 << 30)


def open_console(width: int = 120) -> Console:
    """Return a console for tables: as wide as the terminal, or `width` columns in a file."""
    return Console(width=None if sys.stdout.isatty() else width)


def first_card() -> dict[str, str]:
    """Return the environment of a child process that sees only the first visible GPU.

    transformers uses every visible GPU, and a tuning mode refuses several GPUs in one process.
    """
    if not torch.cuda.is_available():
        return dict(os.environ)
    return {**os.environ, VISIBLE: os.environ.get(VISIBLE, "0").split(",")[0].strip()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
