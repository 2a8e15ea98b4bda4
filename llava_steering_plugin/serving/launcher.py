"""Starts upstream's controller, our worker and upstream's web page, watches them and stops them."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from llava_steering_plugin.serving.options import EVERYWHERE, START_VARIABLE, ServeOptions, reachable
from llava_steering_plugin.serving.preflight import missing_libraries
from llava_steering_plugin.serving.processes import Program, Programs
from llava_steering_plugin.serving.proxies import EVERYTHING, bypassing, call
from llava_steering_plugin.serving.upstream_program import ALLOWED_HOST

START_SECONDS = 300.0
LOAD_SECONDS = 3600.0  # a large model from a slow disk


def serve(options: ServeOptions, console: Console, ports: Mapping[str, int]) -> None:
    """Serve until Ctrl-C or SIGTERM.

    The page and the worker listen on the hosts of the options, the controller on localhost.

    Args:
        options: paths in them are absolute, because the programs run in another folder.
        ports: the port of each program, as `find_ports` returns them.

    Raises:
        ProgramDied: one of the three has ended; the others are stopped.
    """
    controller = f"http://127.0.0.1:{ports['controller']}"
    worker = f"http://{reachable(options.api_host)}:{ports['worker']}"
    worker_options = options.worker(port=ports["worker"], controller=controller)
    host = options.host.strip("[]")
    host = f"[{host}]" if ":" in host else host  # as URLs and gradio want an IPv6 address
    page = f"http://{reachable(host)}:{ports['page']}"
    logged = ["--log-requests"] if options.log_requests else []
    path = _checkout_path()
    local = {**path, **EVERYTHING}  # controller and page call this machine only, and never through a proxy
    first, second, third = (
        Program(
            "controller",
            [
                *("-m", "llava_steering_plugin.serving.controller"),
                *("--host", "127.0.0.1", "--port", str(ports["controller"])),
            ],
            lambda: _answers("POST", f"{controller}/list_models"),
            local,
            "green",
            hidden="Receive heart beat",
        ),
        Program(
            "worker",
            ["-m", "llava_steering_plugin.serving.worker", *worker_options.as_words()],
            # It is up when the controller knows it and it answers. In this order: while it loads its model,
            # connections to it wait, and a Ctrl-C would wait with them.
            lambda: bool(_models(controller)) and _answers("GET", f"{worker}/health"),
            {**path, **bypassing(os.environ), **worker_options.as_environment(), START_VARIABLE: str(Path.cwd())},
            "cyan",
        ),
        Program(
            "page",
            [
                *("-m", "llava_steering_plugin.serving.page", *logged),
                *("--host", host, "--port", str(ports["page"]), "--controller-url", controller),
                *(word for name in options.allowed_host or () for word in (ALLOWED_HOST, name)),
            ],
            lambda: _answers("GET", page),
            local,
            "magenta",
        ),
    )
    with tempfile.TemporaryDirectory(prefix="llava-serve-") as scratch:
        # Upstream's programs write their log files into the current folder. Temporary files are removed with this
        # folder, also those of a program that had to be killed.
        folder = Path.cwd() if options.log_requests else Path(scratch)
        with _stop_signals() as received, Programs(console, folder, Path(scratch)) as running:
            # The worker retries until the controller answers; the page gives up if there is none.
            running.start(first)
            running.start(second)
            running.wait(first, START_SECONDS, lambda: received)
            if not received:
                running.start(third)
                running.wait(third, START_SECONDS, lambda: received)
            running.wait(second, LOAD_SECONDS, lambda: received)
            if not received:
                for name in _models(controller):
                    running.say(f"  {name}", "none")
                running.say(f"all is up: {page}   (Ctrl-C stops everything)", "bold green")
                if not missing_libraries():
                    running.say(f"the same models, as OpenAI's clients ask: {worker}/v1")
                for hint in hints(options):
                    running.say(hint)
            while not received:
                running.check()
                time.sleep(0.3)
            running.say("stopping")


def hints(options: ServeOptions) -> list[str]:
    """Return what to say of names under which page and API are called, and which they do not know."""
    if options.allowed_host:
        return []
    everywhere = [
        what
        for what, host in (("open the page", options.host), ("ask the API", options.api_host))
        if host.strip("[]") in EVERYWHERE
    ]
    return [f"to {what} under another name than localhost, give that with --allowed-host" for what in everywhere]


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C, SIGTERM and a closed terminal in the list inside the block, so that all programs end in order."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _checkout_path() -> dict[str, str]:
    """Return the variables with which the programs, in another folder, find the LLaVA checkout in the current one."""
    here = Path.cwd()
    if not (here / "llava" / "__init__.py").is_file():
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")]))}


def _answers(method: str, url: str) -> bool:
    return call(method, url) is not None


def _models(controller: str) -> list[str]:
    response = call("POST", f"{controller}/list_models")
    return sorted(response.json()["models"]) if response is not None else []
