"""Read the memory of a process: its current size, its peak, and its private memory by kind (Linux, CUDA)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

MB = 1 << 20
_GUARD = 1 << 16  # largest guard area before a thread's stack, in bytes


def in_use(*, cuda: bool) -> int:
    """Return the bytes that this process holds: CUDA's allocations, or the resident set."""
    if cuda:
        import torch

        return int(torch.cuda.memory_allocated())
    return _status("VmRSS")


def forget_peak(*, cuda: bool) -> None:
    """Reset the peak, so that `peak` counts from now on."""
    if cuda:
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM


def peak(*, cuda: bool) -> int:
    """Return the largest number of bytes that this process held since `forget_peak`."""
    if cuda:
        import torch

        return int(torch.cuda.max_memory_allocated())
    return _status("VmHWM")


def private_by_kind(pid: int) -> dict[str, float]:
    """Return the private memory of a process in MB by kind, from /proc/PID/smaps.

    `arenas` are glibc's arenas except the first one, which is the heap: they begin at multiples of 64 MB. A thread's
    stack follows a guard area without access rights.
    """
    sums: Counter[str] = Counter()
    kind, guarded = "", False
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if words[0].endswith(":"):
            if words[0].startswith("Private_"):
                sums[kind] += int(words[1])
            continue
        (begin, end), rights, name = (int(part, 16) for part in words[0].split("-")), words[1], "".join(words[5:])
        if "x" in rights and (not name or "memfd" in name):
            kind = "compiled"
        elif name and name != "[heap]":
            kind = "stacks" if name == "[stack]" else "files"
        elif name:
            kind = "heap"
        else:
            kind = "arenas" if begin % (64 * MB) == 0 else "stacks" if guarded else "anonymous"
        guarded = rights.startswith("---") and end - begin <= _GUARD
    return {kind: kilobytes / 1024 for kind, kilobytes in sums.items()}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
