"""The options of the worker and of `llava-steering serve`, each declared once, and typer commands made of them.

Importing it imports no torch: `--help` needs none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from llava_steering_plugin.inference.options import Device, Load4bit, Load8bit, MaxResident
from llava_steering_plugin.serving.http.limits import Limits

TOKEN_VARIABLE = "LLAVA_STEERING_ADMIN_TOKEN"
KEY_VARIABLE = "LLAVA_STEERING_API_KEY"
# `serve` tells its worker where it was started: the worker itself runs in a temporary folder.
START_VARIABLE = "LLAVA_STEERING_START"
DEFAULTS = Limits()
MEGABYTE = 1 << 20

# Addresses that stand for all of this machine's, and the ones at which they can be reached from it.
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class Engine(str, Enum):
    """The programs that answer for `llava-steering serve`."""

    WORKER = "worker"
    VLLM = "vllm"


Port = Annotated[int | None, typer.Option(min=1, max=65535, help="Default: a free port.")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options that the worker and `llava-steering serve` share: the model, its adapters, and the limits."""

    adapters: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]ADAPTER", help="Adapters to serve: folders or hub ids, one or more after the flag."
        ),
    ] = None
    more_adapters: Annotated[list[str] | None, typer.Argument(hidden=True)] = None
    adapter_dir: Annotated[
        Path | None,
        typer.Option(
            "--adapter-dir", "--adapter-folder", help="Serve every adapter in this folder, and follow its changes."
        ),
    ] = None
    watch_every: Annotated[
        float, typer.Option(min=0.05, help="Look for changes in --adapter-dir every so many seconds.")
    ] = 2.0
    model_name: Annotated[
        str | None, typer.Option(help="Name of the base on the web page; default: LLaVA's name for its path.")
    ] = None
    device: Device = "auto"
    load_4bit: Load4bit = False
    load_8bit: Load8bit = False
    max_resident: MaxResident = None
    batch: Annotated[
        int, typer.Option(min=1, help="Requests that wait are answered together, up to so many; 1: one by one.")
    ] = DEFAULTS.batch
    limit_model_concurrency: Annotated[int, typer.Option(min=1, help="Batches generated at the same time.")] = (
        DEFAULTS.running
    )
    limit_queue: Annotated[
        int, typer.Option(min=0, help="Requests that may wait for their turn; further ones get status 503.")
    ] = DEFAULTS.waiting
    limit_body_mb: Annotated[float, typer.Option(min=0.001, help="Largest request, in MB.")] = (
        DEFAULTS.body_bytes / MEGABYTE
    )
    limit_prompt: Annotated[int, typer.Option(min=1, help="Longest prompt, in characters.")] = (
        DEFAULTS.prompt_characters
    )
    limit_pixels: Annotated[int, typer.Option(min=1, help="Largest image, in pixels.")] = DEFAULTS.image_pixels
    stall_seconds: Annotated[
        float, typer.Option(min=0.1, help="Close the connection of a client that reads nothing for so many seconds.")
    ] = DEFAULTS.stall_seconds
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Take requests that name this server so, from pages that do, besides localhost and its own address: "
            "for remote pages, reverse and notebook proxies. May be repeated.",
        ),
    ] = None
    admin_token: Annotated[
        str | None,
        typer.Option(
            envvar=TOKEN_VARIABLE,
            help="Turn on /admin/adapters, for requests with this token. Prefer the environment variable: other users "
            "of this machine can read the command line.",
        ),
    ] = None
    admin_any_path: Annotated[
        bool, typer.Option("--admin-any-path", help="Let an administrator load adapters from any folder.")
    ] = False
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=KEY_VARIABLE,
            help="Ask for this key on the routes under /v1. Prefer the environment variable.",
        ),
    ] = None
    no_api_key: Annotated[bool, typer.Option("--no-api-key", help="Let other machines use /v1 without a key.")] = False
    allowed_media_domains: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="Fetch images of the API from https://HOST. May be repeated."),
    ] = None
    allowed_local_media_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Read images of the API (file: URLs) in this folder.")
    ] = None
    log_requests: Annotated[bool, typer.Option("--log-requests", help="Log prompts and answers.")] = False

    @property
    def adapter_words(self) -> list[str]:
        """The words [NAME=]ADAPTER of the command line, in their order."""
        return [*(self.adapters or []), *(self.more_adapters or [])]

    def limits(self) -> Limits:
        """Return the limits of the HTTP side."""
        return Limits(
            running=self.limit_model_concurrency,
            batch=self.batch,
            waiting=self.limit_queue,
            body_bytes=int(self.limit_body_mb * MEGABYTE),
            prompt_characters=self.limit_prompt,
            image_pixels=self.limit_pixels,
            stall_seconds=self.stall_seconds,
        )


@dataclass(frozen=True, kw_only=True)
class WorkerOptions(ModelOptions):
    """All options of `python -m llava_steering_plugin.serving.worker`."""

    model_path: Annotated[
        str, typer.Option("--model-path", metavar="BASE", help="The base model: a folder or a hub id.")
    ]
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 accepts connections from other machines.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 21002
    worker_address: Annotated[
        str | None,
        typer.Option(help="URL at which the controller and the page reach this worker; default: from host and port."),
    ] = None
    controller_address: Annotated[str, typer.Option(help="URL of the controller.")] = "http://localhost:21001"
    no_register: Annotated[bool, typer.Option("--no-register", help="Run without a controller.")] = False

    def as_words(self) -> list[str]:
        """Return the command line that gives these options, without what other users must not read there."""
        words: list[str] = []
        for name, option, value in self._given():
            if option.envvar is not None:
                continue
            # In an annotation, typer keeps the first name of an option as its "default".
            declared = [word for word in (option.default, *(option.param_decls or ())) if isinstance(word, str)]
            flag = declared[0] if declared else f"--{name.replace('_', '-')}"
            if value is True:
                words.append(flag)
            else:
                words += [
                    word for each in (value if isinstance(value, list) else [value]) for word in (flag, str(each))
                ]
        return [*words, *(self.more_adapters or [])]

    def as_environment(self) -> dict[str, str]:
        """Return the variables that give the options which `as_words` leaves out."""
        return {str(option.envvar): str(value) for _, option, value in self._given() if option.envvar is not None}

    def _given(self) -> Iterator[tuple[str, OptionInfo, Any]]:
        """Yield the name, the declaration and the value of every option that is not at its default."""
        hints = get_type_hints(type(self), include_extras=True)
        for field in fields(self):
            option, value = _declaration(hints[field.name]), getattr(self, field.name)
            if isinstance(option, OptionInfo) and value != field.default:
                yield field.name, option, value


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ModelOptions):
    """All options of `llava-steering serve`."""

    base: Annotated[str, typer.Argument(metavar="BASE", help="The base model: a folder or a hub id.")]
    host: Annotated[
        str, typer.Option(help="Address of the web page; 0.0.0.0 accepts connections from other machines.")
    ] = "127.0.0.1"
    page_port: Annotated[
        int | None,
        typer.Option(
            "--port", "--page-port", min=1, max=65535, help="Port of the web page; default: 7860 or a free one."
        ),
    ] = None
    controller_port: Port = None
    worker_port: Port = None
    api_host: Annotated[
        str, typer.Option(help="Address of the worker with its API; 0.0.0.0 accepts connections from other machines.")
    ] = "127.0.0.1"
    engine: Annotated[
        Engine,
        typer.Option(help="Who answers: our worker with LLaVA's page, or vLLM's own server, on an exported base."),
    ] = Engine.WORKER
    vllm_flags: Annotated[
        str | None, typer.Option(metavar="FLAGS", help="Further flags of vLLM's server, in one word.")
    ] = None

    def worker(self, *, port: int, controller: str) -> WorkerOptions:
        """Return the options of the worker that this server starts."""
        shared = {field.name: getattr(self, field.name) for field in fields(ModelOptions)}
        return WorkerOptions(
            **shared,
            model_path=self.base,
            host=self.api_host.strip("[]"),
            port=port,
            worker_address=f"http://{reachable(self.api_host)}:{port}",
            controller_address=controller,
        )


def reachable(host: str) -> str:
    """Return the address at which this machine reaches a server that listens on `host`, as URLs want it."""
    host = host.strip("[]")
    host = EVERYWHERE.get(host, host)
    return f"[{host}]" if ":" in host else host


Options = TypeVar("Options", bound=ModelOptions)


def command(run: Callable[[Options], None], options: type[Options]) -> Callable[..., None]:
    """Return a function for `typer.Typer.command` with the fields of `options` as its parameters; it calls `run`."""
    hints = get_type_hints(options, include_extras=True)

    def function(**values: Any) -> None:
        run(options(**values))

    # A class's own fields first: the base model before its adapters.
    inherited = {field.name for field in fields(ModelOptions)}
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=hints[field.name],
            )
            for field in sorted(fields(options), key=lambda field: field.name in inherited)
        ]
    )
    function.__annotations__ = hints
    function.__name__, function.__doc__ = run.__name__, run.__doc__
    return function


def _declaration(hint: Any) -> object:
    """Return what typer is told of an annotated type."""
    return get_args(hint)[1] if get_origin(hint) is Annotated else None
