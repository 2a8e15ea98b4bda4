"""The flags that the worker and `llava-steering serve` share, and some of them `chat` and `eval`; what --device means.

Needs nothing that only serving needs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.serving.http.limits import Limits

TOKEN_VARIABLE = "LLAVA_STEERING_ADMIN_TOKEN"
DEFAULTS = Limits()
BODY_MB = DEFAULTS.body_bytes / (1 << 20)

BasePath = Annotated[str, typer.Option("--model-path", metavar="BASE", help="The base model: a folder or a hub id.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(metavar="[NAME=]ADAPTER", help="Adapters to serve: folders or hub ids; several after one flag."),
]
MoreAdapters = Annotated[list[str] | None, typer.Argument(hidden=True)]
AdapterFolder = Annotated[
    Path | None,
    typer.Option("--adapter-dir", "--adapter-folder", help="Folder of adapter folders; its changes are followed."),
]
WatchEvery = Annotated[float, typer.Option(min=0.05, help="Seconds between two looks into --adapter-dir.")]
ModelName = Annotated[str | None, typer.Option(help="The base's name on the page; default: upstream's, by its path.")]
Device = Annotated[str, typer.Option(help="auto: cuda where there is a GPU, else cpu.")]
Load4bit = Annotated[bool, typer.Option("--load-4bit", help="Quantise the base to 4 bits.")]
Load8bit = Annotated[bool, typer.Option("--load-8bit", help="Quantise the base to 8 bits.")]
MaxResident = Annotated[
    int | None, typer.Option(min=1, help="Adapters on the device at a time; the others wait in CPU memory.")
]
Running = Annotated[int, typer.Option("--limit-model-concurrency", min=1, help="Answers that are made at a time.")]
Waiting = Annotated[int, typer.Option("--limit-queue", min=0, help="Requests that may wait; more get status 503.")]
BodyLimit = Annotated[float, typer.Option("--limit-body-mb", min=0.001, help="Longest request, in MB.")]
PromptLimit = Annotated[int, typer.Option("--limit-prompt", min=1, help="Longest prompt, in characters.")]
PixelLimit = Annotated[int, typer.Option("--limit-pixels", min=1, help="Largest image, in pixels.")]
Stall = Annotated[float, typer.Option("--stall-seconds", min=0.1, help="Patience with clients that stop to read.")]
AdminToken = Annotated[
    str | None,
    typer.Option(
        envvar=TOKEN_VARIABLE,
        help="Switches /admin/adapters on. Other users of this machine see it among the flags: better in the variable.",
    ),
]
AnyPath = Annotated[bool, typer.Option("--admin-any-path", help="An administrator may name any folder.")]
LogRequests = Annotated[bool, typer.Option("--log-requests", help="Log prompts and answers.")]


def chosen_device(asked: str) -> str:
    """The device that `--device` asks for; for the processor, this process is shown no GPU from now on.

    Upstream's loader lets accelerate choose a place for the vision tower, which is a GPU wherever one can be seen. CUDA
    looks once at what it may see: call this before anything is imported that starts it.

    Raises:
        ArgumentsError: there is no such device.
    """
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(asked).type
    except RuntimeError as error:
        raise ArgumentsError(f"--device {asked} is none that torch knows: auto, cpu, cuda, cuda:1.") from error
    if kind == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif kind == "cuda" and not torch.cuda.is_available():
        raise ArgumentsError(f"--device {asked}: torch finds no GPU. Use --device cpu, or --device auto.")
    return asked
