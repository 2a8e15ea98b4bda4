"""The sub-command `llava-steering serve`: its flags, made into a plan."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from llava_steering_plugin.serving import options as flags

Port = Annotated[int | None, typer.Option(min=1, max=65535, help="Default: a free one.")]


def serve(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base model: a folder or a hub id.")],
    more_adapters: flags.MoreAdapters = None,
    adapters: flags.Adapters = None,
    adapter_dir: flags.AdapterFolder = None,
    watch_every: flags.WatchEvery = 2.0,
    model_name: flags.ModelName = None,
    device: flags.Device = "auto",
    load_4bit: flags.Load4bit = False,
    load_8bit: flags.Load8bit = False,
    max_resident: flags.MaxResident = None,
    host: Annotated[str, typer.Option(help="Where the page listens; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    page_port: Annotated[
        int | None, typer.Option("--port", "--page-port", min=1, max=65535, help="Default: 7860, or a free one.")
    ] = None,
    controller_port: Port = None,
    worker_port: Port = None,
    limit_model_concurrency: flags.Running = flags.DEFAULTS.running,
    limit_queue: flags.Waiting = flags.DEFAULTS.waiting,
    limit_body_mb: flags.BodyLimit = flags.BODY_MB,
    limit_prompt: flags.PromptLimit = flags.DEFAULTS.prompt_characters,
    limit_pixels: flags.PixelLimit = flags.DEFAULTS.image_pixels,
    stall_seconds: flags.Stall = flags.DEFAULTS.stall_seconds,
    admin_token: flags.AdminToken = None,
    admin_any_path: flags.AnyPath = False,
    log_requests: flags.LogRequests = False,
) -> None:
    """Serve many adapters on one base: upstream's controller and web page with our worker, on this machine."""
    from rich.console import Console

    from llava_steering_plugin.inference.sources import read_sources
    from llava_steering_plugin.serving.launcher import ServeOptions
    from llava_steering_plugin.serving.launcher import serve as run

    sources = read_sources([*(adapters or []), *(more_adapters or [])])
    values = {
        "--model-path": _absolute(base),
        "--adapter-dir": adapter_dir.absolute() if adapter_dir is not None else None,
        "--watch-every": watch_every,
        "--model-name": model_name,
        "--device": device,
        "--max-resident": max_resident,
        "--limit-model-concurrency": limit_model_concurrency,
        "--limit-queue": limit_queue,
        "--limit-body-mb": limit_body_mb,
        "--limit-prompt": limit_prompt,
        "--limit-pixels": limit_pixels,
        "--stall-seconds": stall_seconds,
    }
    switches = {"--load-4bit": load_4bit, "--load-8bit": load_8bit, "--admin-any-path": admin_any_path}
    worker = [word for flag, value in values.items() if value is not None for word in (flag, str(value))]
    worker += [flag for flag, on in switches.items() if on]
    worker += [word for name, source in sources.items() for word in ("--adapters", f"{name}={source}")]
    # By the environment: flags are there to be read by everybody on the machine.
    environment = {} if admin_token is None else {flags.TOKEN_VARIABLE: admin_token}
    run(
        ServeOptions(worker, environment, host, page_port, controller_port, worker_port, log_requests),
        Console(highlight=False, emoji=False),
    )


def _absolute(name_or_path: str) -> str:
    """A folder by its whole path, since the programs run in another one; anything else is a hub id."""
    path = os.path.expanduser(name_or_path)
    return str(Path(path).absolute()) if os.path.exists(path) else name_or_path
