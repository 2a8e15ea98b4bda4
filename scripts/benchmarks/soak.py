"""Put a running worker under load of every kind, and compare its state at the end with its state after a warm-up.

    python -m llava_steering_plugin.serving.worker --model-path BASE --adapter-dir ADAPTERS --no-register &
    python scripts/benchmarks soak http://127.0.0.1:21002 [--minutes 5] [--clients 12] [--json FILE]

The worker must run on this machine: memory is read from the process that listens on the port. Clients ask all of its
models, with and without images; some disconnect during an answer, read slowly, send invalid requests, or too large
ones. The warm-up is a fifth of the time, with the same load. Memory is compared while the worker is idle. The test
passes if memory has grown by no more than the tolerance, at least one request was answered, every answer was complete
(a busy worker may refuse), every refusal had its own status, and no file descriptor or thread is left over.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import typer

from llava_steering_plugin.serving.proxies import bypass_proxies

from .shared.process_memory import MB, private_by_kind
from .shared.verdicts import write_json
from .soak_clients import Clients


@dataclass(frozen=True)
class Rest:
    """The state of an idle process: memory in MB, open files and connections, threads.

    Attributes:
        kinds: the private memory by kind.
    """

    resident: float
    private: float
    files: int
    threads: int
    kinds: dict[str, float]


def at_rest(clients: Clients, process: psutil.Process) -> Rest:
    """Return the state of the worker's process once it is idle."""
    clients.wait_until_rested()
    memory = process.memory_full_info()
    kinds = private_by_kind(process.pid)
    return Rest(memory.rss / MB, memory.uss / MB, process.num_fds(), process.num_threads(), kinds)


def listener(url: str) -> psutil.Process:
    """Return the process of this machine that listens on the port of `url`."""
    port = int(url.rstrip("/").rpartition(":")[2])
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return psutil.Process(connection.pid)
    raise typer.BadParameter(f"no process that this user may inspect listens on port {port} of this machine")


def problems_of(clients: Clients, warm: Rest, ended: Rest, tolerance: float) -> list[str]:
    """Return the problems between the warm-up and the end."""
    problems = [f"{count} x {what}" for what, count in clients.wrong.most_common()]
    if not clients.answered:
        problems.append("no request was answered, so the test shows nothing: the worker is too busy")
    if ended.private - warm.private > tolerance:
        problems.append(f"memory has grown by {ended.private - warm.private:.1f} MB, more than {tolerance:g}")
    problems += [
        f"{after - before} {what} are left over"
        for what, before, after in (("files", warm.files, ended.files), ("threads", warm.threads, ended.threads))
        if after > before + 5
    ]
    return problems


def run(url: str, minutes: float, count: int, tolerance: float, json_file: Path | None) -> int:
    """Run the test with `count` clients; return its exit status."""
    bypass_proxies(url)
    process = listener(url)
    clients = Clients(url)
    began = at_rest(clients, process)
    clients.run(minutes * 60 / 5, count)
    warm = at_rest(clients, process)
    clients.run(minutes * 60 * 4 / 5, count)
    ended = at_rest(clients, process)
    for what, rest in (("before", began), ("warm", warm), ("at the end", ended)):
        typer.echo(
            f"{what:>10}: {rest.resident:8.1f} MB resident, {rest.private:8.1f} MB private, {rest.files} files, "
            f"{rest.threads} threads"
        )
    grown = {kind: ended.kinds[kind] - warm.kinds.get(kind, 0) for kind in sorted(ended.kinds)}
    typer.echo("  grown by: " + ", ".join(f"{size:+.1f} MB {kind}" for kind, size in grown.items()))
    typer.echo(", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in clients.seen.most_common()))
    problems = problems_of(clients, warm, ended, tolerance)
    if json_file is not None:
        states = {"began": vars(began), "warm": vars(warm), "ended": vars(ended)}
        write_json(json_file, {**states, "seen": clients.seen, "wrong": problems})
    for problem in problems:
        typer.echo(f"WRONG: {problem}")
    return 1 if problems else 0
