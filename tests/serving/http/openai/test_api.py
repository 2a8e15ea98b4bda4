"""Who may use the API: its key, and the administrator's token for loading adapters in vLLM's spelling.

Covers `serving/http/keys.py`, too.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from api_fixtures import LIMITS, asks, messages_of
from ports import free_port
from serving_fixtures import NAMES, TOKEN, Alone, Client, Question, listening

from llava_steering_plugin.serving.http.admin import Admin

pytest_plugins = ["serving_fixtures", "api_fixtures"]
pytest.importorskip("sse_starlette", reason="the API needs sse-starlette: run scripts/setup.sh")
pytest.importorskip("prometheus_client", reason="the API needs prometheus-client: run scripts/setup.sh")

KEY = "a-key-that-is-long-enough-\u00e4"


@pytest.fixture(scope="module")
def folder(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an administrator may load: an adapter, and what is none."""
    folder = tmp_path_factory.mktemp("loaded")
    shutil.copytree(shelf / "dogs", folder / "dogs-2")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def locked(worker: Any, folder: Path, tiny: Any) -> Iterator[Client]:
    """The worker with a key, an administrator, and a folder of images."""
    from llava_steering_plugin.serving.http.app import build
    from llava_steering_plugin.serving.http.openai.api import ApiSettings

    admin = Admin(TOKEN, worker.catalog, lambda: None, LIMITS, folder=folder)
    api = ApiSettings(key=KEY, media_folder=tiny.images, admin=admin)
    with listening(build(worker, LIMITS, admin=admin.routes(), api=api), free_port()) as client:
        yield client


Ask = Callable[..., requests.Response]


@pytest.fixture
def ask(locked: Client) -> Ask:
    def asked(
        method: str, path: str, secret: str | None = None, kind: str = "Bearer", **more: Any
    ) -> requests.Response:
        headers = {} if secret is None else {b"Authorization": f"{kind} {secret}".encode()}
        return requests.request(method, locked.address + path, headers=headers, timeout=120, **more)

    return asked


def code_of(response: requests.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_the_routes_of_the_api_ask_for_the_key_and_upstreams_do_not(
    ask: Ask, locked: Client, asked: list[Question]
) -> None:
    for method, path in (("GET", "/v1/models"), ("GET", "/v1/models/cats"), ("POST", "/v1/chat/completions")):
        for secret in (None, KEY[:-1], KEY + "x", TOKEN, ""):
            refused = ask(method, path, secret)
            assert code_of(refused) == (401, "invalid_api_key") and refused.headers["WWW-Authenticate"] == "Bearer"
        assert ask(method, path, KEY, kind="Basic").status_code == 401
    assert ask("GET", "/v1/models", KEY).ok and ask("GET", "/v1/models", KEY, kind="bearer").ok
    assert ask("POST", "/v1/chat/completions", KEY, json=asks(asked[-1])).ok
    for path in ("/health", "/ready", "/metrics"):
        assert ask("GET", path).ok
    assert ask("POST", "/worker_get_status").ok and locked.answer("cats", asked[-1])


def test_openais_client_is_told_of_a_wrong_key(locked: Client) -> None:
    openai = pytest.importorskip("openai", reason="OpenAI's client is not installed: run scripts/setup.sh")
    with openai.OpenAI(base_url=f"{locked.address}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="This needs the server's API key"):
            client.models.list()


def test_an_administrator_loads_and_unloads_adapters_as_with_vllm(
    ask: Ask, locked: Client, alone: Alone, asked: list[Question]
) -> None:
    load = {"lora_name": "new", "lora_path": "dogs-2"}
    for secret in (None, KEY):  # who may ask may not change what there is
        assert code_of(ask("POST", "/v1/load_lora_adapter", secret, json=load)) == (401, "invalid_admin_token")
        assert code_of(ask("POST", "/v1/unload_lora_adapter", secret, json=load)) == (401, "invalid_admin_token")
    try:
        loaded = ask("POST", "/v1/load_lora_adapter", TOKEN, json=load)
        assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'new' added successfully.")
        [listed] = [each for each in ask("GET", "/v1/models", KEY).json()["data"] if each["id"] == "new"]
        assert listed["root"] == "dogs-2"
        answer = ask("POST", "/v1/chat/completions", KEY, json=asks(asked[0], model="new")).json()
        assert answer["choices"][0]["message"]["content"] == alone("dogs", asked[0])
        assert code_of(ask("POST", "/v1/load_lora_adapter", TOKEN, json=load)) == (400, "adapter_exists")
        assert ask("POST", "/v1/load_lora_adapter", TOKEN, json=load | {"load_inplace": True}).ok
    finally:
        unloaded = ask("POST", "/v1/unload_lora_adapter", TOKEN, json={"lora_name": "new"})
    assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'new' removed successfully.")
    gone = ask("POST", "/v1/unload_lora_adapter", TOKEN, json={"lora_name": "new", "lora_int_id": None})
    assert gone.status_code == 404
    assert ask("POST", "/v1/chat/completions", KEY, json=asks(asked[0], model="new")).status_code == 404
    assert {each["id"] for each in ask("GET", "/v1/models", KEY).json()["data"]} >= set(NAMES)


def test_of_two_who_load_an_adapter_of_one_name_at_once_one_is_told_that_it_is_there(
    ask: Ask, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, arrived = threading.Event(), threading.Semaphore(0)
    change, load = Admin._change, worker.catalog.put

    async def counted(self: Admin, what: Callable[[], Any]) -> Any:
        arrived.release()
        return await change(self, what)

    def slow(name: str, source: str) -> Any:
        held.wait(60)
        return load(name, source)

    monkeypatch.setattr(Admin, "_change", counted)
    monkeypatch.setattr(worker.catalog, "put", slow)
    body = {"lora_name": "new", "lora_path": "dogs-2"}
    try:
        with ThreadPoolExecutor(2) as administrators:
            try:
                loads = [
                    administrators.submit(ask, "POST", "/v1/load_lora_adapter", TOKEN, json=body) for _ in range(2)
                ]
                assert all(arrived.acquire(timeout=60) for _ in loads)
            finally:
                held.set()
            loaded, refused = sorted((each.result() for each in loads), key=lambda each: each.status_code)
        assert loaded.ok and code_of(refused) == (400, "adapter_exists")
    finally:
        ask("POST", "/v1/unload_lora_adapter", TOKEN, json={"lora_name": "new"})


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"lora_name": "x"}, 400, "lora_path is missing"),
        ({"lora_name": "../x", "lora_path": "dogs-2"}, 400, "cannot be the name of an adapter"),
        ({"lora_name": "x", "lora_path": "../dogs"}, 403, "Adapters may only come from"),
        ({"lora_name": "x", "lora_path": "/etc"}, 403, "Adapters may only come from"),
        ({"lora_name": "x", "lora_path": "empty"}, 400, "AdapterError"),
        ({"lora_name": "x", "lora_path": "a\0b"}, 400, "lora_path is no path"),
        ({"lora_name": "x", "lora_path": "dogs-2", "spelled_wrong": 1}, 400, "spelled_wrong is not supported"),
    ],
)
def test_what_may_not_be_loaded_is_refused_and_nothing_changes(
    ask: Ask, worker: Any, body: dict[str, str], status: int, said: str
) -> None:
    before = worker.catalog.names()
    refused = ask("POST", "/v1/load_lora_adapter", TOKEN, json=body)
    assert refused.status_code == status and said in refused.json()["error"]["message"]
    assert worker.catalog.names() == before


def test_a_file_in_the_folder_is_an_image_and_no_other_file_is(
    ask: Ask, alone: Alone, asked: list[Question], folder: Path
) -> None:
    def answer(url: str) -> requests.Response:
        fields = asks(asked[0], messages=messages_of(asked[0], url=url))
        return ask("POST", "/v1/chat/completions", KEY, json=fields)

    image = asked[0].image
    assert answer(f"file://{image}").json()["choices"][0]["message"]["content"] == alone("cats", asked[0])
    refused = answer(f"file://{folder}/dogs-2/adapter_config.json")
    assert code_of(refused) == (400, "invalid_image_url")


def test_it_is_ready_unless_no_more_may_wait(worker: Any) -> None:
    from llava_steering_plugin.serving.http.app import build

    app = build(worker, LIMITS)
    with listening(app, free_port()) as client:
        url = f"{client.address}/ready"
        assert requests.get(url, timeout=30).json() == {"status": "ready"}
        app.state.admission.open_requests += LIMITS.answers
        full = requests.get(url, timeout=30)
        app.state.admission.open_requests -= LIMITS.answers
        assert full.status_code == 503 and full.headers["Retry-After"]
        assert requests.get(url, timeout=30).ok
