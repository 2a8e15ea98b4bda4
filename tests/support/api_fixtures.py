"""The API of a running worker with eight adapters, and OpenAI's own client for it.

A test module asks for them with `pytest_plugins = ["serving_fixtures", "api_fixtures"]`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from ports import free_port
from serving_fixtures import Client, Question, listening

from llava_steering_plugin.serving.http.limits import Limits

LIMITS = Limits(running=4, waiting=8, body_bytes=1 << 20, prompt_characters=2000, images=2, image_pixels=90_000)


def data_url(image: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"


def messages_of(question: Question, *, image_first: bool = False, url: str | None = None) -> list[dict[str, Any]]:
    """What a client of the API sends for a question of upstream's page: the same system prompt, text and image."""
    system, _, rest = question.prompt.partition(" USER: ")
    text = rest.removesuffix(" ASSISTANT:").removeprefix("<image>\n")
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if question.image is not None:
        url = url or data_url(question.image)
        parts.insert(0 if image_first else 1, {"type": "image_url", "image_url": {"url": url}})
    return [{"role": "system", "content": system}, {"role": "user", "content": parts}]


def asks(question: Question, **changes: Any) -> dict[str, Any]:
    """The fields of a request that is answered greedily."""
    fields = {"messages": messages_of(question), "max_tokens": question.tokens, "temperature": 0}
    return {"model": "cats"} | fields | changes


def post(api: Client, body: Any, **options: Any) -> requests.Response:
    return requests.post(f"{api.address}/v1/chat/completions", **({"json": body, "timeout": 120} | options))


def error_of(response: requests.Response) -> dict[str, Any]:
    error = response.json()
    assert error.keys() == {"error"} and error["error"].keys() == {"message", "type", "param", "code"}
    return dict(error["error"])


@pytest.fixture(scope="session")
def api(worker: Any) -> Iterator[Client]:
    """The worker's HTTP side with its API."""
    pytest.importorskip("sse_starlette", reason="the API needs sse-starlette: run scripts/setup.sh")
    pytest.importorskip("prometheus_client", reason="the API needs prometheus-client: run scripts/setup.sh")
    from llava_steering_plugin.serving.http.app import build
    from llava_steering_plugin.serving.http.openai.api import ApiSettings

    with listening(build(worker, LIMITS, api=ApiSettings()), free_port()) as client:
        yield client


@pytest.fixture(scope="session")
def openai_client(api: Client) -> Iterator[Any]:
    """OpenAI's own client, for that API."""
    openai = pytest.importorskip("openai", reason="OpenAI's client is not installed: run scripts/setup.sh")
    with openai.OpenAI(base_url=f"{api.address}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client
