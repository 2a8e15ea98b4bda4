"""Checks what the server's options and the files that they name tell, before a program starts or a model is loaded.

It takes a second, and imports torch only where a device is named. All that is wrong is said at once. What it cannot
see is left to the worker: whether the weights of base and adapters belong together, and whether they fit into memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from llava_steering_plugin.adapters.stored.folder import AdapterFolder
from llava_steering_plugin.checkout.find import find_llava
from llava_steering_plugin.errors import AdapterError, ArgumentsError, Problems, SteeringError, listing
from llava_steering_plugin.inference import options as inference_options
from llava_steering_plugin.inference.base_files import check_adapters_fit, check_base
from llava_steering_plugin.inference.sources import locate_all, read_sources, shown_base
from llava_steering_plugin.serving.http.access import checked_hosts
from llava_steering_plugin.serving.names import ServedAdapter, named
from llava_steering_plugin.serving.option_checks import checked_folder, checked_key, checked_token
from llava_steering_plugin.serving.options import ModelOptions, ServeOptions, WorkerOptions
from llava_steering_plugin.serving.ports import find_ports

# What the API needs beside what LLaVA brings: modules, and the packages that hold them.
API_LIBRARIES = {"sse_starlette": "sse-starlette", "prometheus_client": "prometheus-client"}
LONGEST_SECONDS = 1_000_000.0  # 11 days; the system's timers take little more


def check_server(options: ServeOptions) -> dict[str, int]:
    """Check all options of `llava-steering serve`; return the port of each program by its name.

    Raises:
        SteeringError: something cannot work; the message names all of it, and advises flags that `serve` has.
    """
    problems = Problems()
    ports: dict[str, int] = {}
    with problems.noted():
        if not (Path.cwd() / "llava" / "__init__.py").is_file():  # the programs find that one
            find_llava()
    if options.device != "auto":
        with problems.noted():
            inference_options.choose_device(options.device)
    _check_shared(options, options.base, " The base is the first word after `serve`.", problems)
    check_api(options, options.api_host, "--api-host", problems)
    with problems.noted():
        ports = find_ports(options)
    problems.raise_any("`serve` cannot start")
    return ports


def check_worker(options: WorkerOptions, problems: Problems) -> tuple[str, dict[str, AdapterFolder]]:
    """Check all options of the worker but its port; return its device and its adapters.

    Args:
        problems: gets the errors.
    """
    device = options.device
    with problems.noted():
        find_llava()
    with problems.noted():
        device = inference_options.choose_device(options.device)
    folders = _check_shared(options, options.model_path, " Give the base with --model-path.", problems)
    check_api(options, options.host, "--host", problems)
    return device, folders


def missing_libraries() -> list[str]:
    """Return the names of the packages that the API needs and that are not installed."""
    return [package for module, package in API_LIBRARIES.items() if find_spec(module) is None]


def check_api(options: ModelOptions, host: str, flag: str, problems: Problems) -> None:
    """Check the options of the API.

    Args:
        host, flag: where it listens, and by which flag that was said.
        problems: gets the errors.
    """
    if missing := missing_libraries():
        asked: dict[str, object] = {
            "--api-key": options.api_key,
            "--allowed-media-domains": options.allowed_media_domains,
            "--allowed-local-media-path": options.allowed_local_media_path,
        }
        with problems.noted():
            if flags := [name for name, value in asked.items() if value is not None]:
                raise ArgumentsError(f"{', '.join(flags)}: {no_api(missing)}")
        return
    with problems.noted():
        checked_key(options, host, flag)
    with problems.noted():
        checked_hosts(options.allowed_media_domains or (), "--allowed-media-domains")
    if (folder := options.allowed_local_media_path) is not None:
        with problems.noted():
            checked_folder(folder, "--allowed-local-media-path")


def no_api(missing: list[str]) -> str:
    """Return what to say where packages are missing that the API needs."""
    return (
        f"the API under /v1 needs {' and '.join(missing)}, not installed here. Get it with "
        "`pip install 'llava-steering-plugin[serve]'`."
    )


def _check_shared(options: ModelOptions, base: str, advice: str, problems: Problems) -> dict[str, AdapterFolder]:
    """Check the base and the options that worker and `serve` share; return the adapters that were found."""
    folders = _check_flags(options, problems)
    shown = options.model_name or name_of_base(base)
    with problems.noted():
        config = check_base(base, advice)
        shown = options.model_name or shown_base(name_of_base(base), config)
        check_adapters_fit(folders, base, config)
    with problems.noted():
        _check_names(folders, shown)
    return folders


def _check_flags(options: ModelOptions, problems: Problems) -> dict[str, AdapterFolder]:
    """Check the options that worker and `serve` share, and find the adapters."""
    for flag, number in (
        ("--watch-every", options.watch_every),
        ("--limit-body-mb", options.limit_body_mb),
        ("--stall-seconds", options.stall_seconds),
    ):
        with problems.noted():
            if not math.isfinite(number) or number > LONGEST_SECONDS:
                raise ArgumentsError(f"{flag} {number:g}: give a number up to {LONGEST_SECONDS:,.0f}.")
    with problems.noted():
        inference_options.check_bits(options.load_4bit, options.load_8bit, options.device)
    with problems.noted():
        checked_hosts(options.allowed_host or ())
    if options.admin_token is not None:
        with problems.noted():
            checked_token(options.admin_token)
    if options.adapter_dir is not None:
        with problems.noted():
            checked_folder(options.adapter_dir)
    return locate_all(read_sources(options.adapter_words, problems), problems)


def name_of_base(path: str) -> str:
    """Return LLaVA's name for a model at `path`, by the rule of its `get_model_name_from_path`."""
    parts = path.strip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


def _check_names(folders: Mapping[str, AdapterFolder], base: str) -> None:
    """Check that each adapter has names of its own, as the worker's catalog would.

    Raises:
        AdapterError: some have none; the message names them all.
    """
    wrong = []
    adapters: list[ServedAdapter] = []
    for name, folder in folders.items():
        try:
            adapters.append(named(name, folder.source, folder.config.conversation, base, adapters))
        except SteeringError as error:
            wrong.append(str(error))
    if wrong:
        raise AdapterError(listing("some adapters cannot be served", wrong))
