"""Upstream's protocol: reads requests, and refuses those that cannot be answered in upstream's form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive

from llava_steering_plugin.serving.http.limits import Limits

# Upstream's page shows the text and the code of any chunk whose code is not 0. Upstream uses 1 to 3 for failures; 4 is
# ours.
FAILED, REFUSED = 1, 4
# For how long, and up to how many times the limit, an oversized body is read and discarded: a client that is still
# sending would not see the answer.
DRAINED_SECONDS, DRAINED_TIMES = 5.0, 8
LONG = 1 << 16  # bytes of JSON above which parsing would block the event loop too long
# Lists, objects and their parts in a request, besides the commas and brackets of its prompt. Each costs many times the
# two bytes that it takes in JSON.
PARTS = 1024


class Refused(Exception):
    """A request that is answered with an error; the text goes to the client and contains nothing of the request."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status
        self.text = text

    def response(self) -> Response:
        """Return the answer in the form that upstream's page and controller read."""
        return refusal(self.status, self.text)


def refusal(status: int, text: str) -> Response:
    """Return an error in the form that upstream's page and controller read."""
    headers = {"Retry-After": "5"} if status == 503 else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(chunk(text, REFUSED), status, headers, "application/json")


def chunk(text: str, code: int) -> bytes:
    """Return one state of an answer in upstream's protocol: JSON and a zero byte."""
    return json.dumps({"text": text, "error_code": code}).encode() + b"\0"


async def left(receive: Receive) -> None:
    """Return when the client of a request has disconnected, whose body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_object(request: Request, limits: Limits) -> dict[str, Any]:
    """Return the JSON object in the body of a request.

    Raises:
        Refused: it is too long or has too many parts (413), is too slow (408), no JSON (400) or no object (422).
        ClientDisconnect: the client has gone.
    """
    parts = request.stream()
    try:
        body = await asyncio.wait_for(_collect(request, parts, limits.body_bytes), limits.receive_seconds)
    except asyncio.TimeoutError as error:
        raise Refused(408, f"The request did not arrive within {limits.receive_seconds:g} seconds.") from error
    if body is None:
        with suppress(asyncio.TimeoutError, ClientDisconnect):
            await asyncio.wait_for(_drain(parts, DRAINED_TIMES * limits.body_bytes), DRAINED_SECONDS)
        raise Refused(413, f"The request is longer than {limits.body_bytes:,} bytes.")
    try:
        # Images take a while to parse; the event loop serves others meanwhile.
        most = limits.prompt_characters + PARTS
        data = await asyncio.to_thread(_parsed, body, most) if len(body) > LONG else _parsed(body, most)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "The request is not valid JSON.") from error
    if not isinstance(data, dict):
        raise Refused(422, "The request is not a JSON object.")
    return data


def _parsed(body: bytes, most: int) -> Any:
    """Return the value of the JSON.

    Raises:
        Refused: it has more than `most` parts.
        ValueError, RecursionError: it is no valid JSON.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > most:
        raise Refused(413, f"The request has more than {most:,} parts.")
    return json.loads(body)


async def _collect(request: Request, parts: AsyncGenerator[bytes, None], most: int) -> bytes | None:
    """Return the body; None if it is longer than `most`: then the rest of `parts` is still to come."""
    announced = request.headers.get("content-length", "").lstrip("0")
    # Python reads no number of thousands of digits.
    if announced.isascii() and announced.isdigit() and (len(announced) > 18 or int(announced) > most):
        return None
    body = bytearray()
    async for part in parts:
        body += part
        if len(body) > most:
            return None
    return bytes(body)


async def _drain(parts: AsyncGenerator[bytes, None], most: int) -> None:
    """Discard what arrives, up to `most` bytes."""
    async for part in parts:
        most -= len(part)
        if most < 0:
            return
