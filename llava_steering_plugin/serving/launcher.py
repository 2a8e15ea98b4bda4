"""`llava-steering serve`: upstream's controller, our worker and upstream's web page, started, watched and stopped."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import requests
from rich.console import Console

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.serving.processes import Program, Programs

START_SECONDS = 300.0
PAGE_PORT = 7860  # gradio's
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # and where that can be called
LOAD_SECONDS = 3600.0  # a large model from a slow disk


@dataclass(frozen=True)
class ServeOptions:
    """What is to be served and where.

    Attributes:
        worker: the flags of the worker that say what and how; not where.
        worker_environment: variables for the worker, which other users of the machine do not see.
        host: where the page listens; the controller and the worker listen on localhost.
        page_port, controller_port, worker_port: None for a free one; the page then tries PAGE_PORT first.
        log_requests: whether prompts and answers are logged and kept.
    """

    worker: list[str]
    worker_environment: dict[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    page_port: int | None = None
    controller_port: int | None = None
    worker_port: int | None = None
    log_requests: bool = False


def serve(plan: ServeOptions, console: Console) -> None:
    """Runs until Ctrl-C or SIGTERM.

    Raises:
        ArgumentsError: a port is taken.
        ProgramDied: one of the three has ended; the others are stopped.
    """
    ports = _ports(plan)
    controller, worker = (f"http://127.0.0.1:{ports[name]}" for name in ("controller", "worker"))
    host = plan.host.strip("[]")
    host = f"[{host}]" if ":" in host else host  # as URLs and gradio want an IPv6 address
    page = f"http://{EVERYWHERE.get(host, host)}:{ports['page']}"
    logged = ["--log-requests"] if plan.log_requests else []
    found = _checkout()
    first, second, third = (
        Program(
            "controller",
            ["-m", "llava.serve.controller", "--host", "127.0.0.1", "--port", str(ports["controller"])],
            lambda: _answers("POST", f"{controller}/list_models"),
            found,
            "green",
            unshown="Receive heart beat",
        ),
        Program(
            "worker",
            [
                *("-m", "llava_steering_plugin.serving.worker", *plan.worker, *logged),
                *("--host", "127.0.0.1", "--port", str(ports["worker"])),
                *("--worker-address", worker, "--controller-address", controller),
            ],
            # The controller has to know of it, for the page, and it to answer. In this order: while it loads its model
            # connections wait, and a Ctrl-C would with them.
            lambda: bool(_models(controller)) and _answers("GET", f"{worker}/health"),
            {**found, **plan.worker_environment},
            "cyan",
        ),
        Program(
            "page",
            [
                *("-m", "llava_steering_plugin.serving.page", *logged),
                *("--host", host, "--port", str(ports["page"]), "--controller-url", controller),
            ],
            lambda: _answers("GET", page),
            found,
            "magenta",
        ),
    )
    with tempfile.TemporaryDirectory(prefix="llava-serve-") as scratch:
        # Upstream's programs write their log files into the folder they run in. Temporary files go with this folder,
        # also those of a program that had to be killed.
        folder = Path.cwd() if plan.log_requests else Path(scratch)
        with _asked_to_stop() as asked, Programs(console, folder, Path(scratch)) as running:
            # The worker goes on asking for the controller; the page gives up if there is none.
            running.start(first)
            running.start(second)
            running.wait(first, START_SECONDS, lambda: asked)
            if not asked:
                running.start(third)
                running.wait(third, START_SECONDS, lambda: asked)
            running.wait(second, LOAD_SECONDS, lambda: asked)
            if not asked:
                for name in _models(controller):
                    running.say(f"  {name}", "none")
                running.say(f"all is up: {page}   (Ctrl-C stops everything)", "bold green")
            while not asked:
                running.check()
                time.sleep(0.3)
            running.say("stopping")


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Inside the block, Ctrl-C, SIGTERM and a closed terminal are noted in the list, so that all ends in order."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _checkout() -> dict[str, str]:
    """Has the programs find the LLaVA checkout that this one was started in: they run in another folder."""
    here = Path.cwd()
    if not (here / "llava" / "__init__.py").is_file():
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")]))}


def _ports(plan: ServeOptions) -> dict[str, int]:
    wanted = {"controller": plan.controller_port, "worker": plan.worker_port, "page": plan.page_port}
    ports: dict[str, int] = {}
    with ExitStack() as held:  # all until all are found, or the same free one could be found twice
        for name, port in wanted.items():
            host = plan.host.strip("[]") if name == "page" else "127.0.0.1"
            preferred = [PAGE_PORT, 0] if name == "page" else [0]
            for choice in preferred if port is None else [port]:
                try:
                    ports[name] = _held(held, host, choice)
                    if ":" in host:
                        _held(held, "127.0.0.1", ports[name])  # gradio wants it free there too
                    break
                except OSError as error:
                    reason = error.strerror
            else:
                where, flags = (host, "") if port is None else (f"{host}:{port}", f" or --{name}-port")
                flags = f"--host{flags}" if name == "page" else f"--{name}-port"
                raise ArgumentsError(f"the {name} cannot listen on {where}: {reason}. Give another {flags}.")
    return ports


def _held(held: ExitStack, host: str, port: int) -> int:
    """The port, 0 for a free one, which nobody else can take now; OSError if somebody has it."""
    probe = held.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind((host, port))
    return int(probe.getsockname()[1])


def _request(method: str, url: str) -> Any:
    try:
        response = requests.request(method, url, timeout=5)
        return response if response.status_code == 200 else None
    except requests.exceptions.RequestException:
        return None


def _answers(method: str, url: str) -> bool:
    return _request(method, url) is not None


def _models(controller: str) -> list[str]:
    response = _request("POST", f"{controller}/list_models")
    return sorted(response.json()["models"]) if response is not None else []
