"""What scripts and clients rely on: the options of serve, chat, eval, worker and page, and the JSON keys of the worker.

A changed name here is a broken script somewhere: add to these lists, and take nothing out of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
import requests
from serving_fixtures import Client, listening
from typer.main import get_command

from llava_steering_plugin.cli import app
from llava_steering_plugin.serving import worker
from llava_steering_plugin.serving.options import Engine

pytest_plugins = ["serving_fixtures"]

SERVED = {
    "--adapters": None,
    "more_adapters": None,
    "--adapter-dir": None,
    "--adapter-folder": None,
    "--watch-every": 2.0,
    "--model-name": None,
    "--device": "auto",
    "--load-4bit": False,
    "--load-8bit": False,
    "--max-resident": None,
    "--batch": 8,
    "--limit-model-concurrency": 5,
    "--limit-queue": 64,
    "--limit-body-mb": 16.0,
    "--limit-prompt": 65_536,
    "--limit-pixels": 40_000_000,
    "--stall-seconds": 60.0,
    "--allowed-host": None,
    "--admin-token": None,
    "--admin-any-path": False,
    "--api-key": None,
    "--no-api-key": False,
    "--allowed-media-domains": None,
    "--allowed-local-media-path": None,
    "--log-requests": False,
}
OPTIONS = {
    "serve": SERVED
    | {
        "base": None,
        "--host": "127.0.0.1",
        "--port": None,
        "--page-port": None,
        "--controller-port": None,
        "--worker-port": None,
        "--api-host": "127.0.0.1",
        "--engine": Engine.WORKER,
        "--vllm-flags": None,
    },
    "worker": SERVED
    | {
        "--model-path": None,
        "--host": "127.0.0.1",
        "--port": 21002,
        "--worker-address": None,
        "--controller-address": "http://localhost:21001",
        "--no-register": False,
    },
    "chat": {
        "path": None,
        "more": None,
        "--adapters": None,
        "--image": None,
        "--model-base": None,
        "--device": "auto",
        "--load-4bit": False,
        "--load-8bit": False,
        "--temperature": 0.2,
        "--max-new-tokens": 512,
        "--conv-mode": None,
    },
    "eval": {
        "base": None,
        "--question-file": None,
        "--image-folder": None,
        "--answers-file": None,
        "--adapter": None,
        "--ask": None,
        "--batch-size": 8,
        "--conv-mode": None,
        "--max-new-tokens": 128,
        "--temperature": 0.0,
        "--top-p": None,
        "--num-beams": 1,
        "--seed": 0,
        "--device": "auto",
        "--load-4bit": False,
        "--load-8bit": False,
        "--max-resident": None,
        "--timing": None,
    },
}


def command(name: str) -> click.Command:
    if name == "worker":
        return get_command(worker.app)
    commands: dict[str, click.Command] = get_command(app).commands  # type: ignore[attr-defined]
    return commands[name]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_options_of_a_program_and_their_defaults_are_these(name: str) -> None:
    parameters = command(name).params
    assert {word: each.default for each in parameters for word in (*each.opts, *each.secondary_opts)} == OPTIONS[name]


@pytest.mark.parametrize("name", ["serve", "worker"])
def test_secrets_may_come_from_the_environment(name: str) -> None:
    variables = {each.name: each.envvar for each in command(name).params if each.envvar is not None}
    assert variables == {"admin_token": "LLAVA_STEERING_ADMIN_TOKEN", "api_key": "LLAVA_STEERING_API_KEY"}


def test_status_and_health_have_these_keys(client: Client) -> None:
    status = requests.post(f"{client.address}/worker_get_status", timeout=30).json()
    assert status.keys() == {"model_names", "speed", "queue_length"}
    assert client.health().keys() == {"status", "models", "rejected", "running", "open", "rested"}


def test_the_answers_to_an_administrator_have_these_keys(worker: Any, shelf: Path, unused_name: str) -> None:
    from ports import free_port
    from serving_fixtures import TOKEN

    from llava_steering_plugin.serving.http.admin import Admin
    from llava_steering_plugin.serving.http.app import build
    from llava_steering_plugin.serving.http.limits import Limits

    limits = Limits(running=4)
    routes = Admin(TOKEN, worker.catalog, lambda: None, limits, folder=shelf).routes()
    with listening(build(worker, limits, admin=routes), free_port()) as client:
        listed = client.admin("GET").json()
        assert listed.keys() == {"base", "adapters", "rejected"}
        keys = "name shown source mode settings parameters bytes resident conversation"
        assert listed["adapters"] and all(each.keys() == set(keys.split()) for each in listed["adapters"])
        put = client.admin("POST", json={"name": unused_name, "path": "cats"})
        assert put.json() == {"name": unused_name, "shown": unused_name}
        assert client.admin("DELETE", f"/{unused_name}").json() == {"name": unused_name}


@pytest.fixture
def unused_name(worker: Any) -> str:
    assert worker.catalog.find("surface") is None
    return "surface"
