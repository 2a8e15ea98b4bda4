"""The worker's HTTP side: upstream's two routes, /health and /ready; /v1, /metrics and /admin where they are on.

Upstream's own routes take any body, stop the event loop while they call the controller, and go on generating for
clients that have gone. These keep to limits, return errors in upstream's form, and hold a slot exactly as long as an
answer is generated in it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llava_steering_plugin.serving.generation.answer import Answer
from llava_steering_plugin.serving.generation.request import BUSY, End, Event, Piece, Problem
from llava_steering_plugin.serving.http.access import HostCheck
from llava_steering_plugin.serving.http.admission import Admission
from llava_steering_plugin.serving.http.limits import Limits
from llava_steering_plugin.serving.http.openai.errors import refusal_at
from llava_steering_plugin.serving.http.protocol import (
    FAILED,
    REFUSED,
    Refused,
    chunk,
    left,
    read_object,
    refusal,
)
from llava_steering_plugin.serving.http.validation import CheckedRequest, check_request
from llava_steering_plugin.serving.proxies import host_of

if TYPE_CHECKING:
    from llava_steering_plugin.serving.http.openai.api import ApiSettings
    from llava_steering_plugin.serving.model_worker import AdapterWorker

logger = logging.getLogger(__name__)

# Upstream's clients skip empty states of an answer. One every few seconds keeps the page (which times out after 10
# seconds) and the controller (5) waiting while an answer queues or its prefill takes long.
KEEP_ALIVE, KEEP_ALIVE_SECONDS = b"\0", 3.0


class States:
    """The states of an answer in upstream's protocol: each has the prompt and the whole text so far."""

    def __init__(self, prompt: str):
        self.prompt = prompt
        self.text = ""

    def after(self, event: Event) -> bytes:
        """Return the state that an event leads to; nothing where the answer ends without one."""
        if isinstance(event, Piece):
            self.text += event.text
            return chunk(self.prompt + self.text, 0)
        if event.problem is None:
            return b""
        return chunk(event.message, REFUSED if event.problem is Problem.TOO_LONG else FAILED)


class StreamEndpoint:
    """Answers POST /worker_generate_stream. An ASGI application of its own, to notice when a client disconnects."""

    def __init__(self, worker: AdapterWorker, admission: Admission, log_requests: bool = False):
        self.worker = worker
        self.admission = admission
        self.limits = admission.limits
        self.log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self.admission.admitted(), ExitStack() as arriving:
                arriving.enter_context(self.admission.slots.arriving())
                await self._answer(await self._check(Request(scope, receive)), arriving, receive, send)
        except Refused as refused:
            logger.info("refused with %d: %s", refused.status, refused.text)
            await refused.response()(scope, receive, send)
        except ClientDisconnect:
            logger.info("a client left before its request had arrived")

    async def _check(self, received: Request) -> CheckedRequest:
        data = await read_object(received, self.limits)
        return await asyncio.to_thread(
            check_request, data, self.limits, self.worker.catalog.find, self.worker.is_multimodal
        )

    async def _answer(self, request: CheckedRequest, arriving: ExitStack, receive: Receive, send: Send) -> None:
        started, description = time.monotonic(), str(request)
        leaving = asyncio.ensure_future(left(receive))
        states = States(request.prompt)
        outcome = "a client left"
        answer = None
        try:
            # At once, not when a slot is free: the client sees that its request was accepted.
            headers = [(b"content-type", b"application/octet-stream"), (b"cache-control", b"no-store")]
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
            answer = self.admission.slots.ask(request.asked)
            arriving.close()
            shown = request.shown
            del request  # a client that reads slowly costs a state of its answer, not its request
            if await self._relay(answer, states, leaving, send):
                outcome = "answered"
            if self.log_requests:
                logger.info("prompt %r of %s: %r", states.prompt, shown, states.text)
        except asyncio.TimeoutError:
            outcome = f"a client read nothing for {self.limits.stall_seconds:g} seconds"
        finally:
            if answer is not None:
                answer.cancel()
            leaving.cancel()
            logger.info("%s after %.2f s: %s", outcome, time.monotonic() - started, description)

    async def _relay(self, answer: Answer, states: States, leaving: asyncio.Future[Any], send: Send) -> bool:
        """Send each state of the answer, or only the newest where the client is slower than the model.

        Returns:
            Whether the client has received all of it.
        """
        coming = asyncio.ensure_future(answer.next())
        try:
            while not leaving.done():
                await _either(coming, leaving)
                if not coming.done():
                    await self._send(send, _body(KEEP_ALIVE))
                    continue
                event = coming.result()
                ended = isinstance(event, End)
                await self._send(send, _body(states.after(event), more=not ended))
                if ended:
                    return True
                coming = asyncio.ensure_future(answer.next())
            return False
        finally:
            coming.cancel()

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        """Send a message.

        Raises:
            asyncio.TimeoutError: the client has stopped reading.
        """
        await asyncio.wait_for(send(message), self.limits.stall_seconds)


def give_up_stalled(listener: socket.socket, seconds: float) -> None:
    """Let the kernel close connections whose peers read nothing: closing them here would wait for the peer.

    Connections inherit this from the listening socket. Linux only; elsewhere they stay until the peer disconnects.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


def _body(content: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


async def _either(first: asyncio.Future[Any], second: asyncio.Future[Any]) -> None:
    """Wait for one of them, but not for so long that a client without news would give up."""
    futures: set[asyncio.Future[Any]] = {first, second}
    await asyncio.wait(futures, timeout=KEEP_ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)


def build(
    worker: AdapterWorker,
    limits: Limits,
    *,
    log_requests: bool = False,
    admin: Sequence[Route] = (),
    api: ApiSettings | None = None,
    allowed_hosts: Iterable[str] = (),
) -> Starlette:
    """Return the application.

    Args:
        allowed_hosts: names by which requests may call it, besides those of localhost and the worker's address.
        admin: the routes of `Admin.routes`, if /admin is turned on.
        api: for the routes under /v1, and /metrics; None: there are none.
    """
    admission = Admission(worker, limits)
    endpoint = StreamEndpoint(worker, admission, log_requests)
    more = [*admin]
    middleware = [Middleware(HostCheck, allowed=[host_of(worker.worker_addr), *allowed_hosts])]
    if api is not None:
        # They need packages that LLaVA does not bring.
        from llava_steering_plugin.serving.http.metrics import CountRefusals, Metrics
        from llava_steering_plugin.serving.http.openai.api import routes

        metrics = Metrics(worker, admission)
        middleware.insert(0, Middleware(CountRefusals, metrics=metrics))
        more += [*routes(api, worker, admission, log_requests), Route("/metrics", metrics.answer, methods=["GET"])]

    async def status(request: Request) -> Response:
        return JSONResponse(worker.get_status())

    async def health(request: Request) -> Response:
        return JSONResponse(
            {
                "status": "ok",
                "models": len(worker.catalog.names()),
                "rejected": len(worker.catalog.rejected),
                "running": len(admission.slots.running),
                "open": admission.open_requests,
                "rested": admission.trimmer.trimmed,
            }
        )

    async def ready(request: Request) -> Response:
        if admission.open_requests >= admission.most:
            return refusal(503, BUSY)
        return JSONResponse({"status": "ready"})

    async def http_error(request: Request, error: Exception) -> Response:
        code, detail = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, "")
        return refusal_at(request.url.path, code, detail or "The worker failed; its log says why.")

    app = Starlette(
        routes=[
            Route("/worker_generate_stream", endpoint, methods=["POST"]),
            Route("/worker_get_status", status, methods=["POST"]),
            Route("/health", health, methods=["GET"]),
            Route("/ready", ready, methods=["GET"]),
            *more,
        ],
        middleware=middleware,
        exception_handlers={HTTPException: http_error, Exception: http_error},
        lifespan=lambda _: admission.trimmer.following(worker.catalog),
    )
    app.state.admission = admission
    return app
