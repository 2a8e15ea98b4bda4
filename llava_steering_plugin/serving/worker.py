"""The model worker: upstream's, with any number of adapters on one base.

    python -m llava_steering_plugin.serving.worker --model-path BASE --adapters cats=./cats ./pets --adapter-dir ./more

It speaks upstream's protocol, so upstream's controller and web page take it for one of theirs, with a model for each
adapter and one for the plain base. Flags that upstream's worker has too are called the same.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.lazy_imports import defer_compilation
from llava_steering_plugin.serving import options as flags
from llava_steering_plugin.serving.http.limits import Limits
from llava_steering_plugin.serving.idle_memory import give_large_blocks_back, keep_few_operations

if TYPE_CHECKING:
    from starlette.routing import Route

logger = logging.getLogger(__name__)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def run(
    model_path: flags.BasePath,
    adapters: flags.Adapters = None,
    more_adapters: flags.MoreAdapters = None,
    adapter_dir: flags.AdapterFolder = None,
    watch_every: flags.WatchEvery = 2.0,
    model_name: flags.ModelName = None,
    device: flags.Device = "auto",
    load_4bit: flags.Load4bit = False,
    load_8bit: flags.Load8bit = False,
    max_resident: flags.MaxResident = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 21002,
    worker_address: Annotated[
        str | None, typer.Option(help="This worker's URL as controller and page reach it; default: from host and port.")
    ] = None,
    controller_address: Annotated[str, typer.Option(help="The controller's URL.")] = "http://localhost:21001",
    no_register: Annotated[bool, typer.Option("--no-register", help="Run without a controller.")] = False,
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
    """Serve a base and its adapters to LLaVA's controller and web page."""
    logging.basicConfig(level=logging.INFO)
    given = [*(adapters or []), *(more_adapters or [])]
    limits = Limits(
        running=limit_model_concurrency,
        waiting=limit_queue,
        body_bytes=int(limit_body_mb * (1 << 20)),
        prompt_characters=limit_prompt,
        image_pixels=limit_pixels,
        stall_seconds=stall_seconds,
    )
    give_large_blocks_back()
    keep_few_operations()
    chosen = flags.chosen_device(device)

    import uvicorn

    from llava_steering_plugin.inference.sources import load_all, locate_all, read_sources
    from llava_steering_plugin.serving.folder_watch import WatchedFolder, checked_folder
    from llava_steering_plugin.serving.http.admin import Admin, checked_token
    from llava_steering_plugin.serving.http.app import build, give_up_stalled

    # What flags and files can tell is found before a model is loaded.
    folders = locate_all(read_sources(given))
    if admin_token is not None:
        checked_token(admin_token)
    if adapter_dir is not None:
        checked_folder(adapter_dir)
    address = worker_address or _address(host, port)
    # The port before the model: one that is taken is found out in a second, not in minutes.
    listener = _bound(host, port)
    give_up_stalled(listener, limits.stall_seconds)  # now: connections that are made from here on take it over
    if not _local(host):
        logger.warning("listening on %s: whoever reaches this machine can ask; no password is needed", host)

    from llava_steering_plugin.inference.base_model import loading
    from llava_steering_plugin.serving.controller_link import ControllerLink
    from llava_steering_plugin.serving.model_worker import AdapterWorker

    with loading(model_path):
        worker = AdapterWorker(
            model_path,
            controller=controller_address.rstrip("/"),
            address=address.rstrip("/"),
            model_name=model_name,
            device=chosen,
            load_8bit=load_8bit,
            load_4bit=load_4bit,
            max_resident=max_resident,
        )
    controller_link = ControllerLink(worker)
    load_all(worker.catalog.put, folders)
    if adapter_dir is not None:
        watched = WatchedFolder(adapter_dir.absolute(), worker.catalog, controller_link.changed, watch_every)
        watched.look(settled=True)
        watched.start()
    admin: list[Route] = []
    if admin_token is not None:
        admin = Admin(
            admin_token, worker.catalog, controller_link.changed, limits, folder=adapter_dir, any_path=admin_any_path
        ).routes()
    application = build(worker, limits, log_requests=log_requests, admin=admin)
    if not no_register:
        controller_link.start()
    logger.info("serving %s", ", ".join(worker.catalog.names()))
    config = uvicorn.Config(
        application,
        host,
        port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
        limit_concurrency=limits.connections,
    )
    uvicorn.Server(config).run([listener])


def _address(host: str, port: int) -> str:
    if host in ("0.0.0.0", "::"):
        raise ArgumentsError(f"--host {host} is no address that others can call: say theirs with --worker-address.")
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens: with SO_REUSEADDR others could bind the port until it does.

    Whoever connects now waits in its backlog until the model is loaded.

    Raises:
        ArgumentsError: the port is taken, or there is no such address.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # connections take it over: vanished clients go
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ArgumentsError(f"cannot listen on {host}:{port}: {error}. Choose with --host and --port.") from error
    return listener


def _local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main() -> None:
    """Entry of `python -m llava_steering_plugin.serving.worker`."""
    defer_compilation()
    try:
        app()
    except SteeringError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
