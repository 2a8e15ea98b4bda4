"""The model worker: upstream's, with any number of adapters on one base.

    python -m llava_steering_plugin.serving.worker --model-path BASE --adapters cats=./cats ./pets --adapter-dir ./more

It speaks upstream's protocol: upstream's controller and web page see a model for each adapter and one for the plain
base. Options that upstream's worker also has keep their names.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from llava_steering_plugin.errors import ArgumentsError, Problems, SteeringError
from llava_steering_plugin.lazy_imports import defer_compilation
from llava_steering_plugin.serving.idle_memory import keep_few_operations, return_large_blocks
from llava_steering_plugin.serving.options import START_VARIABLE, WorkerOptions, command
from llava_steering_plugin.serving.preflight import check_worker, missing_libraries, no_api
from llava_steering_plugin.serving.proxies import bypass_proxies, is_loopback

if TYPE_CHECKING:
    from llava_steering_plugin.serving.http.admin import Admin
    from llava_steering_plugin.serving.http.openai.api import ApiSettings

logger = logging.getLogger(__name__)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def run(options: WorkerOptions) -> None:
    """Serve a base and its adapters to LLaVA's controller and web page."""
    logging.basicConfig(level=logging.INFO)
    bypass_proxies(options.controller_address)
    problems = Problems()
    device, folders = check_worker(options, problems)
    with problems.noted():
        address = options.worker_address or _address(options.host, options.port)
    with problems.noted():
        # Bind the port before loading the model: that it is taken shows in a second, not in minutes.
        listener = bind(options.host, options.port)
        if problems.errors:
            listener.close()
    problems.raise_any("the worker cannot start")
    limits = options.limits()
    return_large_blocks()
    keep_few_operations()

    import uvicorn

    from llava_steering_plugin.inference.sources import load_all
    from llava_steering_plugin.serving.folder_watch import WatchedFolder
    from llava_steering_plugin.serving.http.access import checked_hosts
    from llava_steering_plugin.serving.http.admin import Admin
    from llava_steering_plugin.serving.http.app import build, give_up_stalled
    from llava_steering_plugin.serving.http.connections import Connection
    from llava_steering_plugin.serving.http.server import Server

    give_up_stalled(listener, limits.stall_seconds)  # connections made from here on inherit it
    if not is_loopback(options.host):
        logger.warning("listening on %s: who reaches this machine can ask as LLaVA's page does", options.host)

    from llava_steering_plugin.inference.base_model import explained_failures
    from llava_steering_plugin.serving.controller_link import ControllerLink
    from llava_steering_plugin.serving.model_worker import AdapterWorker

    with explained_failures(options.model_path):
        worker = AdapterWorker(
            options.model_path,
            controller=options.controller_address.rstrip("/"),
            address=address.rstrip("/"),
            model_name=options.model_name,
            device=device,
            load_8bit=options.load_8bit,
            load_4bit=options.load_4bit,
            max_resident=options.max_resident,
        )
    controller_link = ControllerLink(worker)
    load_all(worker.catalog.put, folders)
    if options.adapter_dir is not None:
        watched = WatchedFolder(
            options.adapter_dir.absolute(), worker.catalog, controller_link.changed, options.watch_every
        )
        watched.look(settled=True)
        watched.start()
    admin: Admin | None = None
    if options.admin_token is not None:
        admin = Admin(
            options.admin_token,
            worker.catalog,
            controller_link.changed,
            limits,
            folder=options.adapter_dir,
            any_path=options.admin_any_path,
            start=Path(os.environ.get(START_VARIABLE) or Path.cwd()),
        )
    application = build(
        worker,
        limits,
        log_requests=options.log_requests,
        admin=admin.routes() if admin is not None else (),
        api=_api(options, admin),
        allowed_hosts=[options.host, *checked_hosts(options.allowed_host or ())],
    )
    if not options.no_register:
        controller_link.start()
    logger.info("serving %s", ", ".join(worker.catalog.names()))
    config = uvicorn.Config(
        application,
        options.host,
        options.port,
        http=Connection,
        log_config=None,
        access_log=False,
        limit_concurrency=limits.connections,
    )
    Server(config, application.state.admission.slots).run([listener])


app.command()(command(run, WorkerOptions))


def _api(options: WorkerOptions, admin: Admin | None) -> ApiSettings | None:
    """Return how the API is offered; None, with a warning, if packages are missing that it needs."""
    if missing := missing_libraries():
        logger.warning(no_api(missing))
        return None
    from llava_steering_plugin.serving.http.openai.api import ApiSettings

    hosts, folder = options.allowed_media_domains or (), options.allowed_local_media_path
    return ApiSettings(options.api_key, hosts, folder, admin)


def _address(host: str, port: int) -> str:
    if host in ("0.0.0.0", "::"):
        raise ArgumentsError(
            f"--host {host} is no address that others can connect to: give this machine's with --worker-address."
        )
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the port: with SO_REUSEADDR, binding alone would not keep others from it.

    Clients that connect now wait in its backlog until the model is loaded.

    Raises:
        ArgumentsError: the port is taken, or there is no such address.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit it: those of clients that have vanished get closed.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ArgumentsError(f"cannot listen on {host}:{port}: {error}. Choose with --host and --port.") from error
    return listener


def main() -> None:
    """Run `python -m llava_steering_plugin.serving.worker`."""
    defer_compilation()
    try:
        app()
    except SteeringError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
