"""Know the memory of common GPUs, and how much of it a training may use."""

from __future__ import annotations

from dataclasses import dataclass

from llava_steering_plugin.errors import ArgumentsError

GIB = 2**30
# The whole GiB that CUDA reports of each GPU, a little below the figure that it is sold under.
GPUS = {
    "T4": 14,
    "V100-16GB": 15,
    "L4": 22,
    "A10": 22,
    "RTX3090": 23,
    "RTX4090": 23,
    "V100-32GB": 31,
    "RTX5090": 31,
    "A100-40GB": 39,
    "L40S": 44,
    "A6000": 47,
    "A100-80GB": 79,
    "H100": 79,
    "H200": 139,
    "B200": 178,
}
# The rest is for CUDA's context, the workspaces of its libraries and the gaps that the allocator cannot fill.
USABLE = 0.9


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name as it was given, and its bytes."""

    name: str
    size: int

    def holds(self, size: int) -> bool:
        """Return whether a training of that many bytes can be expected to run."""
        return size <= USABLE * self.size


def named_gpu(text: str) -> Gpu:
    """Return the GPU of that name, or one with that many GiB.

    Raises:
        ArgumentsError: neither a known name nor a number above 0.
    """
    plain = _plain(text)
    for name, size in GPUS.items():
        if plain == _plain(name):
            return Gpu(name, size * GIB)
    try:
        given = float(text)
    except ValueError:
        given = 0.0
    if not 0 < given < 1e6:
        raise ArgumentsError(f"--gpu {text} is no GPU known here ({', '.join(GPUS)}); give its memory in GiB instead")
    return Gpu(f"{text} GiB", int(given * GIB))


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace(" ", "").replace("_", "").removesuffix("gb")
