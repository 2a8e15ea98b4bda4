"""Upstream's controller is kept informed. Changes of adapters: http/test_admin.py."""

from __future__ import annotations

import time
from typing import Any

import requests
from changing_fixtures import listed
from serving_fixtures import BASE_NAME, wait_until

from llava_steering_plugin.serving.controller_link import ControllerLink

pytest_plugins = ["serving_fixtures", "changing_fixtures"]


def test_a_controller_that_has_forgotten_the_worker_is_told_again(
    worker: Any, controller_link: ControllerLink, controller: str, shown: set[str]
) -> None:
    time.sleep(1)  # several heart beats: they must not register anew each time
    assert requests.post(f"{controller}/get_worker_address", json={"model": BASE_NAME}, timeout=30).json() == {
        "address": worker.worker_addr
    }
    status = worker.get_status
    try:
        worker.get_status = dict  # as if it did not answer in time: the controller drops it
        worker.worker_addr, address = "http://127.0.0.1:9", worker.worker_addr
        worker.register_to_controller()
    finally:
        worker.get_status, worker.worker_addr = status, address
    assert requests.post(f"{controller}/refresh_all_workers", timeout=30).ok
    wait_until(lambda: listed(controller) == shown)
