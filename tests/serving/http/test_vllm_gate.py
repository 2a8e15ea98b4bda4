"""vLLM's server, as `serve` starts it, asks for keys and refuses other sites as our worker does."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from llava_steering_plugin.serving.http.vllm_gate import GATE, HOSTS_VARIABLE, Gate
from llava_steering_plugin.serving.options import KEY_VARIABLE, TOKEN_VARIABLE

KEY, TOKEN = "0123456789abcdef", "fedcba9876543210"
PATHS = ("/v1/models", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters/pets", "/tokenize", "/health")
CHANGES = PATHS[1:4]


def client(monkeypatch: pytest.MonkeyPatch, key: str = "", token: str = "", hosts: str = "127.0.0.1") -> TestClient:
    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("served")

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("served")
        await websocket.close()

    for name, value in ((KEY_VARIABLE, key), (TOKEN_VARIABLE, token), (HOSTS_VARIABLE, hosts)):
        monkeypatch.setenv(name, value)
    routes = [Route(path, answer, methods=["GET", "POST"]) for path in PATHS]
    app = Starlette(routes=[*routes, WebSocketRoute("/v1/realtime", talk)])
    app.add_middleware(Gate)  # as vLLM does
    return TestClient(app, base_url="http://localhost:8000")


def statuses(asked: TestClient, key: str | None) -> dict[str, int]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return {path: asked.post(path, headers=headers).status_code for path in PATHS}


def test_its_name_is_what_vllm_imports() -> None:
    module, _, name = GATE.rpartition(".")
    assert (module, name) == (Gate.__module__, Gate.__name__)


def test_without_secrets_all_is_open_but_the_change_of_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    found = statuses(client(monkeypatch), None)
    assert found == {path: 404 if path in CHANGES else 200 for path in PATHS}


def test_each_secret_opens_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = client(monkeypatch, KEY, TOKEN)
    assert statuses(asked, None) == {path: 200 if path == "/health" else 401 for path in PATHS}
    assert statuses(asked, KEY) == {path: 401 if path in CHANGES else 200 for path in PATHS}
    assert statuses(asked, TOKEN) == {path: 200 if path in (*CHANGES, "/health") else 401 for path in PATHS}
    refused = asked.post("/v1/models")
    assert refused.json()["error"]["code"] == "invalid_api_key" and refused.headers["WWW-Authenticate"] == "Bearer"
    with pytest.raises(WebSocketDisconnect), asked.websocket_connect("/v1/realtime"):
        pass


def test_other_sites_are_refused_and_named_ones_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = client(monkeypatch, hosts="gpu-3.example 0.0.0.0")
    for headers, status in (
        ({}, 200),
        ({"Host": "gpu-3.example"}, 200),
        ({"Host": "0.0.0.0"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
    ):
        assert asked.get("/v1/models", headers=headers).status_code == status, headers
