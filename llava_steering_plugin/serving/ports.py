"""Finds a free port for each program of `llava-steering serve`."""

from __future__ import annotations

import socket
from contextlib import ExitStack

from llava_steering_plugin.errors import ArgumentsError, Problems
from llava_steering_plugin.serving.options import ServeOptions

PAGE_PORT = 7860  # gradio's default


def find_ports(options: ServeOptions) -> dict[str, int]:
    """Return the port of each program by its name, each one free.

    A port that is not given is any free one; the page tries `PAGE_PORT` first.

    Raises:
        ArgumentsError: ports that the options give are taken or given twice, or their host is not this machine's; the
            message names them all.
    """
    wanted = {"controller": options.controller_port, "worker": options.worker_port, "page": options.page_port}
    problems = Problems()
    for number in {port: None for port in wanted.values() if port is not None}:
        named = [name for name, port in wanted.items() if port == number]
        with problems.noted():
            if len(named) > 1:  # unless somebody listens, the system gives a port to both
                flags = ", ".join(f"--{name}-port" for name in named)
                raise ArgumentsError(f"{flags}: all are {number}. Give each program a port of its own.")
    ports: dict[str, int] = {}
    with ExitStack() as held:  # hold all until all are found, or one could be found twice
        for name, port in wanted.items():
            with problems.noted():
                host = {"page": options.host, "worker": options.api_host}.get(name, "127.0.0.1")
                ports[name] = _found(held, name, port, host.strip("[]"))
    problems.raise_any("some ports cannot be used")
    return ports


def _found(held: ExitStack, name: str, port: int | None, host: str) -> int:
    """Return the port for a program, bound until `held` is closed.

    Raises:
        ArgumentsError: it is taken, or there is no such address.
    """
    preferred = [PAGE_PORT, 0] if name == "page" else [0]
    for choice in preferred if port is None else [port]:
        try:
            found = _held(held, host, choice)
            if ":" in host and name == "page":
                _held(held, "127.0.0.1", found)  # gradio wants it free there too
            return found
        except OSError as error:
            reason = error.strerror
    where, flags = (host, "") if port is None else (f"{host}:{port}", f" or --{name}-port")
    of_host = {"page": "--host", "worker": "--api-host"}.get(name)
    flags = f"{of_host}{flags}" if of_host and (name == "page" or host != "127.0.0.1") else f"--{name}-port"
    raise ArgumentsError(f"the {name} cannot listen on {where}: {reason}. Give another {flags}.")


def _held(held: ExitStack, host: str, port: int) -> int:
    """Bind a port, 0 for a free one, so that nobody else takes it; raise OSError if it is taken."""
    probe = held.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind((host, port))
    return int(probe.getsockname()[1])
