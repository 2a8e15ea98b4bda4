"""Requests are read and refused in upstream's protocol, over real HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest
import requests
from serving_fixtures import Client, body

pytest_plugins = ["serving_fixtures"]

pytestmark = pytest.mark.usefixtures("unharmed")


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b'{"model": "cats",}', b"[" * 2000, b'{"max_new_tokens": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "no text", "comma", "deep", "huge number"],
)
def test_malformed_json_is_a_400(strict: Client, data: bytes) -> None:
    assert strict.refused(None, data=data) == (400, "The request is not valid JSON.")


@pytest.mark.parametrize("data", [[], "text", 3, None])
def test_json_that_is_no_object_is_a_422(strict: Client, data: Any) -> None:
    assert strict.refused(None, data=json.dumps(data).encode())[0] == 422


def test_a_prompt_of_10_mb_is_a_413_and_so_is_any_body_over_the_limit(strict: Client, client: Client) -> None:
    assert strict.refused(body(prompt="x" * 10_000_000))[0] == 413
    assert strict.refused(body(prompt="<image>" + "x" * 3000)) == (413, "The prompt is longer than 2,000 characters.")
    chunked = (b" " * 65536 for _ in range(40))  # without a Content-Length
    assert strict.refused(None, data=chunked)[0] == 413


@pytest.mark.parametrize("data", [b'{"a": [%s[]]}' % (b"[]," * 5000), b'{"a": ' * 5000, b"[" * 100_000])
def test_a_request_of_more_parts_than_any_answer_needs_is_a_413(strict: Client, data: bytes) -> None:
    """16 MB of empty lists become 400 MB of objects."""
    assert strict.refused(None, data=data) == (413, "The request has more than 3,024 parts.")


def test_a_prompt_may_be_nothing_but_commas_and_brackets(strict: Client) -> None:
    status, text = strict.refused(body(prompt="[{," * 666, images=None, model="nobody"))
    assert status == 404, text


def test_other_routes_and_methods_answer_in_the_same_form(strict: Client) -> None:
    for method, path, status in (("GET", "/worker_generate_stream", 405), ("POST", "/../etc/passwd", 404)):
        response = requests.request(method, strict.address + path, timeout=30)
        assert response.status_code == status
        assert json.loads(response.content[:-1])["error_code"] != 0
