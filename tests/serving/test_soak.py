"""A worker under load of every kind for a while ends with the memory, threads and files that it began with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_fixtures import TOKEN, Client, free_port, wait_until
from tiny_llava import TinyLlava
from training_runs import subprocess_environment

pytest_plugins = ["serving_fixtures"]

SOAK = Path(__file__).parents[2] / "scripts" / "soak_serving.py"
MINUTES = 2.5


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


@pytest.mark.slow
def test_minutes_of_answers_hang_ups_nonsense_and_reloads_leave_nothing_behind(alone_in_a_process: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SOAK), alone_in_a_process, "--minutes", str(MINUTES)],
        env={**os.environ, "LLAVA_STEERING_ADMIN_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
