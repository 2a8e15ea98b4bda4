"""Puts a running worker under load of every kind for some minutes, and looks whether it ends as it began.

    python -m llava_steering_plugin.serving.worker --model-path BASE --adapter-dir ADAPTERS --no-register &
    python scripts/soak_serving.py http://127.0.0.1:21002 [--minutes 5] [--clients 12] [--json FILE]

The worker has to run on this machine: its memory is read from the process that listens on the port. Clients ask for all
of its models, with and without images; some hang up in the midst of an answer, read slowly, send what is no request, or
too much of one. With the admin token in LLAVA_STEERING_ADMIN_TOKEN an adapter is loaded again every second as well.

Memory is compared in rest: after a warm-up of the same load (a fifth of the time), and at the end. Status 0 if it has
grown by no more than --tolerance, some requests were answered and every answer was one (other requests may be told that
there is too much to do), every refusal had its own status, no slot is taken, and no file descriptor or thread is left
over. What has grown is shown by kind of memory.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import requests
import typer
from PIL import Image

MB = 1 << 20
PATIENCE = 120
GUARD = 1 << 16  # bytes before a thread's stack
TOKEN = os.environ.get("LLAVA_STEERING_ADMIN_TOKEN")


@dataclass(frozen=True)
class Rest:
    """A process that has nothing to do: memory in MB, open files and connections, threads.

    Attributes:
        kinds: the private memory, by what the process has it for.
    """

    resident: float
    private: float
    files: int
    threads: int
    kinds: dict[str, float]


class Soak:
    """Clients of one worker, and what they saw."""

    def __init__(self, url: str, process: psutil.Process):
        self.url = url.rstrip("/")
        self.process = process
        self.models: list[str] = requests.post(f"{self.url}/worker_get_status", timeout=PATIENCE).json()["model_names"]
        self.images = [_picture(seed) for seed in range(8)]
        self.seen: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.answered = 0
        self._guard = threading.Lock()

    def run(self, seconds: float, clients: int) -> None:
        """Load of all kinds for so many seconds."""
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=self._client, args=(end, number)) for number in range(clients)]
        if TOKEN:
            threads.append(threading.Thread(target=self._administrator, args=(end,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def rest(self) -> Rest:
        """Waits until the worker has nothing to do and has given back what it did not need; what it holds then."""
        end = time.monotonic() + PATIENCE
        while not (health := requests.get(f"{self.url}/health", timeout=PATIENCE).json())["rested"]:
            if time.monotonic() > end:
                self.note("rest", f"something is still going on: {health}")
                break
            time.sleep(0.2)
        time.sleep(6)  # connections are kept open for 5 seconds
        memory = self.process.memory_full_info()
        return Rest(
            memory.rss / MB,
            memory.uss / MB,
            self.process.num_fds(),
            self.process.num_threads(),
            kinds(self.process.pid),
        )

    def note(self, kind: str, wrong: str | None) -> None:
        with self._guard:
            self.seen[kind] += 1
            if wrong is not None:
                self.wrong[f"{kind}: {wrong}"] += 1

    def _client(self, end: float, number: int) -> None:
        chance = random.Random(number)
        kinds = [self._answer] * 6 + [self._hang_up] * 3 + [self._nonsense] * 2 + [self._too_much, self._slow]
        while time.monotonic() < end:
            kind = chance.choice(kinds)
            try:
                self.note(kind.__name__[1:], kind(chance))
            except requests.exceptions.RequestException as error:
                self.note(kind.__name__[1:], type(error).__name__)
            except OSError as error:
                self.note(kind.__name__[1:], str(error))

    def _body(self, chance: random.Random, tokens: int) -> dict[str, Any]:
        images = [chance.choice(self.images)] if chance.random() < 0.8 else []
        words = " ".join(chance.choice(("red", "circle", "where", "is", "what")) for _ in range(chance.randint(1, 40)))
        return {
            "model": chance.choice(self.models),
            "prompt": f"USER: {'<image> ' * len(images)}{words} ASSISTANT:",
            "images": images,
            "temperature": chance.choice((0.0, 0.7)),
            "max_new_tokens": tokens,
            "stop": "</s>",
        }

    def _answer(self, chance: random.Random) -> str | None:
        response = self._post(json=self._body(chance, chance.randint(1, 40)))
        if response.status_code == 503:
            return None  # it said so
        states = [json.loads(part) for part in response.content.split(b"\0") if part]
        if response.status_code != 200 or not states or any(state["error_code"] for state in states):
            return f"{response.status_code} {states[-1:]}"
        with self._guard:
            self.answered += 1
        return None

    def _hang_up(self, chance: random.Random) -> str | None:
        with self._connected(json.dumps(self._body(chance, 400)).encode()) as connection:
            if chance.random() < 0.7:
                connection.recv(200)
            time.sleep(chance.random() / 5)
        return None

    def _slow(self, chance: random.Random) -> str | None:
        with self._connected(json.dumps(self._body(chance, 60)).encode()) as connection:
            for _ in range(10):
                connection.recv(30)
                time.sleep(0.1)
        return None

    def _nonsense(self, chance: random.Random) -> str | None:
        good = self._body(chance, 4)
        data, status = chance.choice(
            [
                (b"{", 400),
                (b"[]", 422),
                (json.dumps(good | {"stop": None}).encode(), 422),
                (json.dumps(good | {"model": "nobody"}).encode(), 404),
                (json.dumps(good | {"prompt": "<image>", "images": ["aGVsbG8="]}).encode(), 400),
                (json.dumps(good | {"prompt": "<image>", "images": [self.images[0][:800]]}).encode(), 400),
            ]
        )
        return self._expect(data, status)

    def _too_much(self, chance: random.Random) -> str | None:
        return self._expect(json.dumps(self._body(chance, 4) | {"prompt": "x" * 10_000_000}).encode(), 413)

    def _expect(self, data: bytes, status: int) -> str | None:
        found = self._post(data=data).status_code
        return None if found in (status, 503) else f"{found} instead of {status}"

    def _post(self, **content: Any) -> requests.Response:
        return requests.post(f"{self.url}/worker_generate_stream", timeout=PATIENCE, **content)

    def _connected(self, content: bytes) -> socket.socket:
        host, _, port = self.url.removeprefix("http://").partition(":")
        connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
        head = f"POST /worker_generate_stream HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        return connection

    def _administrator(self, end: float) -> None:
        adapters: list[dict[str, str]] = []
        while time.monotonic() < end:
            try:
                adapters = adapters or self._admin("GET").json()["adapters"]
                if adapters:  # there may be the base alone
                    adapter = adapters.pop()
                    response = self._admin("POST", json={"name": adapter["name"], "path": adapter["source"]})
                    self.note("load_again", None if response.ok else response.text)
            except (requests.exceptions.RequestException, KeyError) as error:
                self.note("load_again", f"{type(error).__name__}: {error}")
            time.sleep(1)

    def _admin(self, method: str, **content: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return requests.request(method, f"{self.url}/admin/adapters", headers=headers, timeout=PATIENCE, **content)


def _picture(seed: int) -> str:
    file = io.BytesIO()
    side = 60 + 50 * seed
    Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(3 * side * side)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def kinds(pid: int) -> dict[str, float]:
    """Private memory in MB by kind, from /proc/PID/smaps.

    `arenas` are those of glibc but for its first, the heap: they begin at multiples of 64 MB. A thread's stack follows
    a page that nobody may touch.
    """
    sums: Counter[str] = Counter()
    kind, guarded = "", False
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if words[0].endswith(":"):
            if words[0].startswith("Private_"):
                sums[kind] += int(words[1])
            continue
        (begin, end), rights, name = (int(part, 16) for part in words[0].split("-")), words[1], "".join(words[5:])
        if "x" in rights and (not name or "memfd" in name):
            kind = "compiled"
        elif name and name != "[heap]":
            kind = "stacks" if name == "[stack]" else "files"
        elif name:
            kind = "heap"
        else:
            kind = "arenas" if begin % (64 * MB) == 0 else "stacks" if guarded else "anonymous"
        guarded = rights.startswith("---") and end - begin <= GUARD
    return {kind: kilobytes / 1024 for kind, kilobytes in sums.items()}


def listener(url: str) -> psutil.Process:
    """The process of this machine that listens where `url` points."""
    port = int(url.rstrip("/").rpartition(":")[2])
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return psutil.Process(connection.pid)
    raise typer.BadParameter(f"nothing that may be looked at listens on port {port} of this machine")


def problems_of(soak: Soak, warm: Rest, ended: Rest, tolerance: float) -> list[str]:
    """What was wrong, between the warm-up and the end."""
    problems = [f"{count} x {what}" for what, count in soak.wrong.most_common()]
    if not soak.answered:
        problems.append("no request was answered, so that nothing is shown: the worker has too much else to do")
    if ended.private - warm.private > tolerance:
        problems.append(f"memory has grown by {ended.private - warm.private:.1f} MB, more than {tolerance:g}")
    problems += [
        f"{after - before} {what} are left over"
        for what, before, after in (("files", warm.files, ended.files), ("threads", warm.threads, ended.threads))
        if after > before + 5
    ]
    return problems


def main(
    url: str,
    minutes: Annotated[float, typer.Option(min=0.1)] = 5.0,
    clients: Annotated[int, typer.Option(min=1)] = 12,
    tolerance: Annotated[float, typer.Option(help="MB that memory may have grown by.")] = 25.0,
    as_json: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Soak the worker at URL."""
    soak = Soak(url, listener(url))
    began = soak.rest()
    soak.run(minutes * 60 / 5, clients)
    warm = soak.rest()
    soak.run(minutes * 60 * 4 / 5, clients)
    ended = soak.rest()
    for what, rest in (("before", began), ("warm", warm), ("at the end", ended)):
        typer.echo(
            f"{what:>10}: {rest.resident:8.1f} MB resident, {rest.private:8.1f} MB private, {rest.files} files, "
            f"{rest.threads} threads"
        )
    grown = {kind: ended.kinds[kind] - warm.kinds.get(kind, 0) for kind in sorted(ended.kinds)}
    typer.echo("  grown by: " + ", ".join(f"{size:+.1f} MB {kind}" for kind, size in grown.items()))
    typer.echo(", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in soak.seen.most_common()))
    problems = problems_of(soak, warm, ended, tolerance)
    if as_json is not None:
        report = {"began": vars(began), "warm": vars(warm), "ended": vars(ended), "seen": soak.seen, "wrong": problems}
        as_json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for problem in problems:
        typer.echo(f"WRONG: {problem}")
    raise typer.Exit(1 if problems else 0)


if __name__ == "__main__":
    typer.run(main)
