"""Requests of other sites are refused by the worker, the controller and the page, whatever they ask for."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import requests
from ports import free_port
from serving_fixtures import STRICT, Alone, Client, Question, body, listening
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.serving.http.access import HostCheck, checked_host
from llava_steering_plugin.serving.http.app import build
from llava_steering_plugin.serving.upstream_program import import_plainly

pytest_plugins = ["serving_fixtures"]

OWN = [
    {},
    {"Host": "localhost"},
    {"Host": "LOCALHOST.:80"},
    {"Host": "127.8.8.8:1"},
    {"Host": "[::1]:21002"},
    {"Host": "pages.example"},
    {"Origin": "http://localhost:7860"},
    {"Origin": "https://Pages.Example"},
    {"Host": "[fd00::1]:9", "Origin": "http://[fd00::1]:9"},
]
FOREIGN = [
    {"Host": "evil.example"},
    {"Host": "evil.example:21002"},
    {"Host": "localhost.evil.example"},
    {"Host": "127.0.0.1.evil.example"},
    {"Host": "sub.pages.example"},
    {"Host": "0.0.0.0"},
    {"Host": "192.168.1.5"},
    {"Host": ""},
    {"Host": "localhost@evil.example"},
    {"Origin": "http://evil.example"},
    {"Origin": "http://localhost.evil.example"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "file://"},
    {"Origin": "chrome-extension://abcdef"},
    {"Host": "pages.example", "Origin": "http://evil.example"},
]


def checked(*allowed: str) -> TestClient:
    async def there(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    routes = [Route("/", lambda _: PlainTextResponse("hello"), methods=["GET", "POST"]), WebSocketRoute("/ws", there)]
    return TestClient(HostCheck(Starlette(routes=routes), allowed), "http://127.0.0.1")


@pytest.mark.parametrize("headers", OWN, ids=str)
def test_requests_of_the_own_site_pass(headers: dict[str, str]) -> None:
    client = checked("pages.example", "FD00::1", "0.0.0.0")
    assert client.get("/", headers=headers).text == "hello"
    with client.websocket_connect("/ws", headers={"Host": "127.0.0.1"} | headers):
        pass


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_requests_of_other_sites_are_a_403_that_names_the_flag(headers: dict[str, str]) -> None:
    client = checked("pages.example", "0.0.0.0")
    for method in ("GET", "POST", "OPTIONS"):
        answer = client.request(method, "/", headers=headers | {"Content-Type": "text/plain"})
        assert answer.status_code == 403
        assert "with --allowed-host and the name or address by which it is called" in answer.text
        assert "access-control-allow-origin" not in answer.headers
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/ws", headers={"Host": "localhost"} | headers):
        pass


def test_one_foreign_name_among_several_is_enough() -> None:
    client = checked()
    for name, values in (("Host", ("localhost", "evil.example")), ("Origin", ("http://localhost", "http://evil"))):
        assert client.get("/", headers=[(name, value) for value in values]).status_code == 403


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("Pages.Example.", "pages.example"),
        ("10.0.0.1", "10.0.0.1"),
        ("[FD00::1]", "fd00::1"),
        ("fd00:0::1", "fd00::1"),
        ("b\u00fccher.example", "xn--bcher-kva.example"),
        ("gpu_3", "gpu_3"),
    ],
)
def test_a_name_is_taken_as_browsers_send_it(name: str, host: str) -> None:
    assert checked_host(name) == host


@pytest.mark.parametrize("name", ["", "*", "*.example", "http://x", "x:80", "x/y", "a b", "x@y", ".", "a\u2100b"])
def test_what_is_no_name_alone_is_refused(name: str) -> None:
    with pytest.raises(ArgumentsError, match="give a host's name or address alone"):
        checked_host(name)


def test_the_worker_takes_its_own_address_and_allowed_names_and_nothing_else(
    worker: Any, strict: Client, alone: Alone, asked: list[Question]
) -> None:
    question = asked[-1]
    for headers in FOREIGN[:1] + FOREIGN[9:10]:
        for method, path in (("POST", "/worker_generate_stream"), ("POST", "/worker_get_status"), ("GET", "/health")):
            answer = requests.request(method, strict.address + path, headers=headers, timeout=30)
            assert answer.status_code == 403, path
        assert strict.refused(body(), headers=headers)[0] == 403
    before, worker.worker_addr = worker.worker_addr, "http://machine-b:21002"
    try:
        app = build(worker, STRICT, allowed_hosts=["proxy.example"])
    finally:
        worker.worker_addr = before
    with listening(app, free_port()) as client:
        for host in ("machine-b:21002", "proxy.example", "localhost"):
            assert client.post(question.body("cats"), headers={"Host": host}).status_code == 200
        assert client.post(question.body("cats"), headers={"Host": "machine-c"}).status_code == 403
        assert client.answer("cats", question) == alone("cats", question)


def test_a_page_of_another_site_registers_no_worker_at_the_controller(
    patched_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llava.utils

    monkeypatch.setattr(llava.utils, "handler", logging.NullHandler())  # no log file
    upstream = import_plainly("llava.serve.controller")
    controller = object.__new__(upstream.Controller)  # without its thread, which never ends
    controller.worker_info = {}
    monkeypatch.setattr(upstream, "controller", controller, raising=False)
    client = TestClient(HostCheck(upstream.app), "http://127.0.0.1")
    status = {"model_names": ["x"], "speed": 1, "queue_length": 0}

    def register(name: str, **headers: str) -> int:
        worker = json.dumps({"worker_name": name, "check_heart_beat": False, "worker_status": status})
        answer = client.post("/register_worker", content=worker, headers={"Content-Type": "text/plain", **headers})
        return answer.status_code

    assert register("http://127.0.0.1:9") == 200
    assert register("http://evil.example", Origin="http://evil.example") == 403
    assert register("http://evil.example", Host="evil.example") == 403
    assert list(controller.worker_info) == ["http://127.0.0.1:9"]
