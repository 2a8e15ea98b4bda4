"""Checks what the server's options and the files that they name tell, before a program starts or a model is loaded.

It takes a second, and imports torch only where a device is named. What it cannot see is left to the worker: whether
the weights of base and adapters belong together, and whether they fit into memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from llava_steering_plugin.adapters.folder import AdapterFolder
from llava_steering_plugin.checkout.find import find_llava
from llava_steering_plugin.errors import AdapterError, ArgumentsError, SteeringError, listing
from llava_steering_plugin.inference import options as inference_options
from llava_steering_plugin.inference.base_files import check_adapter_fits, check_base
from llava_steering_plugin.inference.sources import locate_all, name_taken, read_sources, shown_name
from llava_steering_plugin.serving.http.access import checked_host
from llava_steering_plugin.serving.options import ModelOptions, ServeOptions, checked_folder, checked_token

LONGEST_SECONDS = 1_000_000.0  # 11 days; the system's timers take little more


def check_server(options: ServeOptions) -> None:
    """Check all options of `llava-steering serve` but its ports.

    Raises:
        SteeringError: something cannot work; the message advises flags that `serve` has.
    """
    folders = check_flags(options)
    if not (Path.cwd() / "llava" / "__init__.py").is_file():  # the programs find that one
        find_llava()
    if options.device != "auto":
        inference_options.choose_device(options.device)
    config = check_base(options.base, " The base is the first word after `serve`.")
    problems = []
    for name, folder in folders.items():
        try:
            check_adapter_fits(name, folder.config, options.base, config)
        except ArgumentsError as error:
            problems.append(str(error))
    problems += _problems_of_names(folders, options.model_name or name_of_base(options.base))
    if problems:
        raise AdapterError(listing("some adapters cannot be served", problems))


def check_flags(options: ModelOptions) -> dict[str, AdapterFolder]:
    """Check the options that the worker and `serve` share, and find the adapters.

    Raises:
        ArgumentsError: a value or a folder that cannot work.
        AdapterError: some places hold no adapter, or a damaged one; the message lists them all.
    """
    for flag, number in (
        ("--watch-every", options.watch_every),
        ("--limit-body-mb", options.limit_body_mb),
        ("--stall-seconds", options.stall_seconds),
    ):
        if not math.isfinite(number) or number > LONGEST_SECONDS:
            raise ArgumentsError(f"{flag} {number:g}: give a number up to {LONGEST_SECONDS:,.0f}.")
    if options.load_4bit and options.load_8bit:
        raise ArgumentsError("--load-4bit and --load-8bit exclude each other. Give one of them.")
    for name in options.allowed_host or ():
        checked_host(name)
    if options.admin_token is not None:
        checked_token(options.admin_token)
    if options.adapter_dir is not None:
        checked_folder(options.adapter_dir)
    return locate_all(read_sources(options.adapter_words))


def name_of_base(path: str) -> str:
    """Return LLaVA's name for a model at `path`, by the rule of its `get_model_name_from_path`."""
    parts = path.strip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


def _problems_of_names(folders: Mapping[str, AdapterFolder], base: str) -> list[str]:
    """Return the reasons why adapters have no name on the page, as the worker's catalog would find them."""
    problems = []
    holders = {base: "the base"}
    for name, folder in folders.items():
        try:
            shown = shown_name(name, folder.config.conversation, base)
        except SteeringError as error:
            problems.append(str(error))
            continue
        if shown in holders:
            problems.append(name_taken(name, folder.source, shown, holders[shown]))
        holders.setdefault(shown, f"the adapter {name!r}")
    return problems
