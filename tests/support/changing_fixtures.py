"""A controller of upstream's, and what lets a served worker's adapters change and be as before after the test."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from ports import free_port
from serving_fixtures import TOKEN, Client, listening, wait_until
from training_runs import subprocess_environment

from llava_steering_plugin.serving.controller_link import ControllerLink
from llava_steering_plugin.serving.http.admin import Admin
from llava_steering_plugin.serving.http.app import build
from llava_steering_plugin.serving.http.limits import Limits


@pytest.fixture(scope="session")
def controller(patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Upstream's controller, as a process."""
    folder, port = tmp_path_factory.mktemp("controller"), free_port()
    command = [sys.executable, "-m", "llava.serve.controller", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=subprocess_environment(patched_llava), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until(lambda: process.poll() is not None or _up(address), 480)  # a busy machine takes minutes
        assert process.poll() is None, (folder / "output").read_text()
        yield address
    finally:
        process.kill()
        process.wait()


def _up(address: str) -> bool:
    try:
        return requests.post(f"{address}/list_models", timeout=5).ok
    except requests.exceptions.RequestException:
        return False


def listed(controller: str) -> set[str]:
    """What the page shows when it is loaded: it asks for these two in this order."""
    assert requests.post(f"{controller}/refresh_all_workers", timeout=30).ok
    return set(requests.post(f"{controller}/list_models", timeout=30).json()["models"])


@pytest.fixture
def shown(worker: Any, client: Client) -> Iterator[set[str]]:
    """What is shown before a test, and after it again, in the same order."""
    before = worker.catalog.adapters()
    yield set(worker.catalog.names())
    for adapter in worker.catalog.adapters():
        worker.catalog.drop(adapter.name)
    for adapter in before:
        worker.catalog.put(adapter.name, adapter.source)
    worker.catalog.rejected.clear()


@pytest.fixture
def controller_link(worker: Any, controller: str, shown: set[str]) -> Iterator[ControllerLink]:
    before = worker.controller_addr
    worker.controller_addr = controller
    controller_link = ControllerLink(worker, every=0.5)
    controller_link.start()
    wait_until(lambda: listed(controller) == shown)
    yield controller_link
    controller_link.stop()
    controller_link.join(30)
    worker.controller_addr = before


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


@pytest.fixture
def admin(worker: Any, controller_link: ControllerLink, folder: Path) -> Iterator[Client]:
    limits = Limits(running=4)
    routes = Admin(TOKEN, worker.catalog, controller_link.changed, limits, folder=folder).routes()
    with listening(build(worker, limits, admin=routes), free_port()) as client:
        yield client
