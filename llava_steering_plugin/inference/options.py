"""Options that chat, eval and the server share, and the choice of the device that `--device` names.

Importing it imports no torch: `--help` needs none.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from llava_steering_plugin.errors import ArgumentsError

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; auto takes the GPU if there is one.")]
Load4bit = Annotated[bool, typer.Option("--load-4bit", help="Quantise the base to 4 bits.")]
Load8bit = Annotated[bool, typer.Option("--load-8bit", help="Quantise the base to 8 bits.")]
MaxResident = Annotated[
    int | None, typer.Option(min=1, help="Keep at most N adapters on the device, the others in CPU memory.")
]


def check_bits(load_4bit: bool, load_8bit: bool, device: str) -> None:
    """Check that at most one of the two is given, for upstream would quietly take 8 bits, and that there is a GPU.

    Args:
        device: as `--device` names it.

    Raises:
        ArgumentsError: both are given, or one without a GPU.
    """
    if load_4bit and load_8bit:
        raise ArgumentsError("--load-4bit and --load-8bit exclude each other. Give one of them.")
    if (load_4bit or load_8bit) and not can_pack(device):
        flag = "--load-4bit" if load_4bit else "--load-8bit"
        raise ArgumentsError(f"{flag} needs a GPU: transformers packs weights on one alone. Leave it out.")


def can_pack(device: str) -> bool:
    """Tell whether LLaVA's transformers packs weights into 4 or 8 bits for the device that `--device` names."""
    import torch

    return device != "cpu" and torch.cuda.is_available()


def choose_device(requested: str) -> str:
    """Return the device that `--device` requests; for the CPU, hide all GPUs from this process.

    Upstream's loader lets accelerate place the vision tower, and accelerate takes a GPU wherever it sees one. CUDA
    reads the list of visible GPUs once: call this before importing anything that initialises CUDA.

    Raises:
        ArgumentsError: torch knows no such device, or finds no GPU.
    """
    import torch

    if requested == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(requested)
        if device.type not in ("cpu", "cuda"):
            torch.empty(1, device=device)  # also says that there is none of this kind
    except (RuntimeError, NotImplementedError, AssertionError, ImportError) as error:
        raise ArgumentsError(
            f"--device {requested}: torch knows no such device here. Use auto, cpu, cuda or cuda:1."
        ) from error
    if device.type == "meta":
        raise ArgumentsError(f"--device {requested} keeps no numbers. Use auto, cpu, cuda or cuda:1.")
    if device.type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ArgumentsError(f"--device {requested}: torch finds no GPU. Use --device cpu, or --device auto.")
        if device.index is not None and device.index >= count:
            raise ArgumentsError(
                f"--device {requested}: torch finds {count} GPU(s), cuda:0 to cuda:{count - 1}. Use one of these."
            )
    return requested
