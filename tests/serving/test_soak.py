"""A worker under load of every kind for a while ends with the memory, threads and files that it began with."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from ports import free_port
from serving_fixtures import TOKEN, Client, wait_until
from tiny_llava import TinyLlava
from training_runs import subprocess_environment

from benchmarks.soak import Rest, problems_of
from benchmarks.soak_clients import Clients

pytest_plugins = ["serving_fixtures"]

BENCHMARKS = Path(__file__).parents[2] / "scripts" / "benchmarks"
MINUTES = 1.5


@pytest.fixture
def alone_in_a_process(tiny: TinyLlava, shelf: Path, patched_llava: Path, tmp_path: Path) -> Iterator[str]:
    """The URL of a worker that is a process of its own, with an administrator."""
    port = free_port()
    command = [sys.executable, "-m", "llava_steering_plugin.serving.worker", "--model-path", str(tiny.llava)]
    command += ["--adapter-dir", str(shelf), "--port", str(port), "--device", "cpu", "--no-register"]
    environment = subprocess_environment(patched_llava, {"LLAVA_STEERING_ADMIN_TOKEN": TOKEN})
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT)
    client = Client(f"http://127.0.0.1:{port}")
    try:
        wait_until(lambda: process.poll() is not None or _up(client), 600)
        assert process.poll() is None, log.read_text()[-3000:]
        yield client.address
    finally:
        process.terminate()
        process.wait(60)


def _up(client: Client) -> bool:
    try:
        return client.health()["status"] == "ok"
    except OSError:
        return False


def test_a_run_in_which_nothing_was_answered_is_wrong(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    clients, rest = Clients(client.address), Rest(1.0, 1.0, 1, 1, {})
    with monkeypatch.context() as busy:
        response = requests.Response()
        response.status_code = 503
        busy.setattr(clients, "_post", lambda **_: response)
        assert clients._answer(random.Random(0)) is None
        [problem] = problems_of(clients, rest, rest, 0)
        assert "no request was answered" in problem
    assert clients._answer(random.Random(0)) is None
    assert problems_of(clients, rest, rest, 0) == []


@pytest.mark.slow
def test_minutes_of_answers_hang_ups_nonsense_and_reloads_leave_nothing_behind(alone_in_a_process: str) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS), "soak", alone_in_a_process, "--minutes", str(MINUTES)],
        env={**os.environ, "LLAVA_STEERING_ADMIN_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
