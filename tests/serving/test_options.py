"""The options of the server: declared once, they pass from `serve` to its worker through a command line."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from llava_steering_plugin.serving.http.limits import Limits
from llava_steering_plugin.serving.options import (
    KEY_VARIABLE,
    TOKEN_VARIABLE,
    ModelOptions,
    ServeOptions,
    WorkerOptions,
    command,
)

OTHER: dict[str, Any] = {
    "adapters": ["cats=/a dir/cats", "dogs"],
    "adapter_dir": Path("/shelf"),
    "watch_every": 0.5,
    "model_name": "a name",
    "device": "cuda:1",
    "load_4bit": True,
    "load_8bit": True,
    "max_resident": 3,
    "batch": 3,
    "limit_model_concurrency": 2,
    "limit_queue": 0,
    "limit_body_mb": 0.5,
    "limit_prompt": 100,
    "limit_pixels": 7,
    "stall_seconds": 1.5,
    "allowed_host": ["pages.example", "::2"],
    "admin_token": "0123456789abcdef",
    "admin_any_path": True,
    "api_key": "fedcba9876543210",
    "no_api_key": True,
    "allowed_media_domains": ["images.example", "::3"],
    "allowed_local_media_path": Path("/pictures"),
    "log_requests": True,
}
ONLY_WORKER: dict[str, Any] = {
    "model_path": "a base",
    "host": "::1",
    "port": 8,
    "worker_address": "http://here:8",
    "controller_address": "http://there:9",
    "no_register": True,
}


def parsed(words: list[str], environment: dict[str, str]) -> WorkerOptions:
    """Return what the worker makes of a command line."""
    taken: list[WorkerOptions] = []
    app = typer.Typer()
    app.command()(command(taken.append, WorkerOptions))
    result = CliRunner().invoke(app, words, env={TOKEN_VARIABLE: None, KEY_VARIABLE: None, **environment})
    assert result.exit_code == 0, result.output
    return taken[0]


def test_every_option_is_tried_here() -> None:
    assert {field.name for field in fields(WorkerOptions)} == OTHER.keys() | ONLY_WORKER.keys() | {"more_adapters"}


@pytest.mark.parametrize("name", [*OTHER, *ONLY_WORKER])
def test_an_option_reaches_the_worker_through_its_command_line(name: str) -> None:
    options = replace(WorkerOptions(model_path="base"), **{name: (OTHER | ONLY_WORKER)[name]})
    assert parsed(options.as_words(), options.as_environment()) == options


def test_all_options_together_reach_the_worker_and_no_secret_is_on_its_command_line() -> None:
    options = WorkerOptions(**OTHER, **ONLY_WORKER)
    assert not {OTHER["admin_token"], OTHER["api_key"]} & set(options.as_words())
    assert options.as_environment() == {TOKEN_VARIABLE: OTHER["admin_token"], KEY_VARIABLE: OTHER["api_key"]}
    assert parsed(options.as_words(), options.as_environment()) == options


def test_several_adapters_may_follow_one_flag() -> None:
    options = parsed(["--model-path", "base", "--adapters", "cats", "dogs=./dogs", "pets"], {})
    assert options.adapter_words == ["cats", "dogs=./dogs", "pets"]


def test_serve_passes_what_it_shares_with_the_worker_and_puts_it_on_localhost() -> None:
    worker = ServeOptions(**OTHER, base="a base", host="0.0.0.0").worker(port=8, controller="http://127.0.0.1:9")
    assert all(getattr(worker, field.name) == OTHER.get(field.name) for field in fields(ModelOptions))
    assert (worker.model_path, worker.host, worker.port) == ("a base", "127.0.0.1", 8)
    assert (worker.worker_address, worker.controller_address) == ("http://127.0.0.1:8", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("host", "listens", "address"),
    [("0.0.0.0", "0.0.0.0", "127.0.0.1"), ("[::]", "::", "[::1]"), ("192.0.2.7", "192.0.2.7", "192.0.2.7")],
)
def test_the_worker_listens_where_the_api_shall_be_and_is_reached_from_here(
    host: str, listens: str, address: str
) -> None:
    worker = ServeOptions(base="a base", api_host=host).worker(port=8, controller="http://127.0.0.1:9")
    assert (worker.host, worker.worker_address) == (listens, f"http://{address}:8")


def test_the_limits_are_those_of_the_options() -> None:
    assert WorkerOptions(model_path="base").limits() == Limits()
    assert WorkerOptions(model_path="base", **OTHER).limits() == Limits(
        running=2, batch=3, waiting=0, body_bytes=1 << 19, prompt_characters=100, image_pixels=7, stall_seconds=1.5
    )
