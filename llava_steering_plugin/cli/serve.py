"""The sub-command `serve`: resolves the paths among its options and starts the server."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.serving.options import Engine, ServeOptions, command


def run(options: ServeOptions) -> None:
    """Serve many adapters on one base: LLaVA's controller and web page with our worker, on this machine."""
    from rich.console import Console

    if options.engine is Engine.VLLM:
        from llava_steering_plugin.serving import vllm_program

        vllm_program.serve(options, Console(highlight=False, emoji=False, soft_wrap=True))
        return
    from llava_steering_plugin.inference.sources import read_sources
    from llava_steering_plugin.serving import launcher
    from llava_steering_plugin.serving.preflight import check_server

    if options.vllm_flags is not None:
        raise ArgumentsError("--vllm-flags is for --engine vllm.")

    options = replace(options, base=absolute_path(options.base))
    ports = check_server(options)
    options = with_whole_paths(options, read_sources(options.adapter_words))
    launcher.serve(options, Console(highlight=False, emoji=False), ports)


def with_whole_paths(options: ServeOptions, sources: dict[str, str]) -> ServeOptions:
    """Return the options with absolute paths, because the programs of the server run in another folder.

    Args:
        sources: the adapters of the options, as `read_sources` returns them.
    """
    return replace(
        options,
        base=absolute_path(options.base),
        adapters=[f"{name}={source}" for name, source in sources.items()],
        more_adapters=None,
        adapter_dir=options.adapter_dir.absolute() if options.adapter_dir is not None else None,
        allowed_local_media_path=media.absolute() if (media := options.allowed_local_media_path) is not None else None,
    )


def absolute_path(name_or_path: str) -> str:
    """Return the absolute path of a folder, or the word itself where there is none: it is a hub id."""
    path = os.path.expanduser(name_or_path)
    return str(Path(path).absolute()) if os.path.exists(path) else name_or_path


serve = command(run, ServeOptions)
