"""Send requests of every kind to a worker, and count the wrong responses."""

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
from typing import Any

import requests
from PIL import Image

TIMEOUT = 120  # seconds
TOKEN = os.environ.get("LLAVA_STEERING_ADMIN_TOKEN")


class Clients:
    """Clients of one worker, and the responses that they got.

    Attributes:
        seen: number of requests by kind.
        wrong: number of wrong responses by kind and reason.
        answered: number of complete answers.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.models: list[str] = requests.post(f"{self.url}/worker_get_status", timeout=TIMEOUT).json()["model_names"]
        self.images = [_picture(seed) for seed in range(8)]
        self.seen: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.answered = 0
        self._guard = threading.Lock()

    def run(self, seconds: float, clients: int) -> None:
        """Send requests of all kinds for `seconds`."""
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=self._client, args=(end, number)) for number in range(clients)]
        if TOKEN:
            threads.append(threading.Thread(target=self._administrator, args=(end,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def wait_until_rested(self) -> None:
        """Wait until the worker is idle, has returned unused memory, and has closed the connections."""
        end = time.monotonic() + TIMEOUT
        while not (health := requests.get(f"{self.url}/health", timeout=TIMEOUT).json())["rested"]:
            if time.monotonic() > end:
                self.note("rest", f"the worker does not become idle: {health}")
                break
            time.sleep(0.2)
        time.sleep(6)  # connections are kept open for 5 seconds

    def note(self, kind: str, wrong: str | None) -> None:
        """Count a request of `kind`, and what was wrong with its response."""
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
            return None  # a busy worker may refuse
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
        return requests.post(f"{self.url}/worker_generate_stream", timeout=TIMEOUT, **content)

    def _connected(self, content: bytes) -> socket.socket:
        host, _, port = self.url.removeprefix("http://").partition(":")
        connection = socket.create_connection((host, int(port)), timeout=TIMEOUT)
        head = f"POST /worker_generate_stream HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        return connection

    def _administrator(self, end: float) -> None:
        adapters: list[dict[str, str]] = []
        while time.monotonic() < end:
            try:
                adapters = adapters or self._admin("GET").json()["adapters"]
                if adapters:  # there may be only the base
                    adapter = adapters.pop()
                    response = self._admin("POST", json={"name": adapter["name"], "path": adapter["source"]})
                    self.note("load_again", None if response.ok else response.text)
            except (requests.exceptions.RequestException, KeyError) as error:
                self.note("load_again", f"{type(error).__name__}: {error}")
            time.sleep(1)

    def _admin(self, method: str, **content: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return requests.request(method, f"{self.url}/admin/adapters", headers=headers, timeout=TIMEOUT, **content)


def _picture(seed: int) -> str:
    """Return a random picture as base64 of a PNG file."""
    file = io.BytesIO()
    side = 60 + 50 * seed
    Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(3 * side * side)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
