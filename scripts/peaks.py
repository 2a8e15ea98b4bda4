"""Memory of this process in bytes, now and at most: CUDA's allocations on a GPU, else the resident set (Linux)."""

from __future__ import annotations

from pathlib import Path

import torch


def in_use(*, cuda: bool) -> int:
    return torch.cuda.memory_allocated() if cuda else _status("VmRSS")


def forget_peak(*, cuda: bool) -> None:
    """Lets `peak` count from now."""
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux's way to reset VmHWM


def peak(*, cuda: bool) -> int:
    """The most since `forget_peak`."""
    return torch.cuda.max_memory_allocated() if cuda else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
