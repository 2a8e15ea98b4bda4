"""The worker's HTTP side: upstream's two routes, /health, and /admin where it is turned on.

Upstream's own routes take any body, stop the event loop while they call the controller, and go on generating for
clients that have gone. These keep to limits, return errors in upstream's form, and hold a slot exactly as long as an
answer is generated in it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llava_steering_plugin.serving.http.access import HostCheck
from llava_steering_plugin.serving.http.latest import LatestState
from llava_steering_plugin.serving.http.limits import Limits
from llava_steering_plugin.serving.http.protocol import (
    FAILED,
    NO_ANSWER,
    TOO_BUSY,
    Refused,
    chunk,
    read_object,
    refusal,
)
from llava_steering_plugin.serving.http.validation import CheckedRequest, check_request
from llava_steering_plugin.serving.idle_memory import IdleTrimmer
from llava_steering_plugin.serving.proxies import host_of

if TYPE_CHECKING:
    from llava_steering_plugin.serving.model_worker import AdapterWorker

logger = logging.getLogger(__name__)

# Upstream's clients skip empty states of an answer. One every few seconds keeps the page (which times out after 10
# seconds) and the controller (5) waiting while an answer queues or its prefill takes long.
KEEP_ALIVE, KEEP_ALIVE_SECONDS = b"\0", 3.0


class StreamEndpoint:
    """Answers POST /worker_generate_stream. An ASGI application of its own, to notice when a client disconnects.

    Attributes:
        open_requests: number of requests not answered yet, waiting ones included.
        slots: one for each answer that may be generated at the same time.
        trimmer: returns free memory when the worker is idle.
    """

    def __init__(self, worker: AdapterWorker, limits: Limits, log_requests: bool = False):
        self.worker = worker
        self.limits = limits
        self.log_requests = log_requests
        self.open_requests = 0
        self.slots = asyncio.Semaphore(limits.running)
        # Pooled threads, like those that generate: a new one for every answer would leave memory behind.
        self._threads = ThreadPoolExecutor(limits.running, "answering")
        worker.share_slots(self.slots, limits.running)
        self.trimmer = IdleTrimmer(self._is_idle)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._admitted():
                await self._answer(await self._check(Request(scope, receive)), receive, send)
        except Refused as refused:
            logger.info("refused with %d: %s", refused.status, refused.text)
            await refused.response()(scope, receive, send)
        except ClientDisconnect:
            logger.info("a client left before its request had arrived")

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self.open_requests >= self.limits.running + self.limits.waiting:
            raise Refused(503, TOO_BUSY)
        self.open_requests += 1
        try:
            yield
        finally:
            self.open_requests -= 1
            self.trimmer.schedule()

    def _release(self) -> None:
        """Free a slot: nothing is generated in it any more."""
        self.slots.release()
        self.trimmer.schedule()

    def _is_idle(self) -> bool:
        return not self.open_requests and self.slots._value == self.limits.running

    async def _check(self, received: Request) -> CheckedRequest:
        data = await read_object(received, self.limits)
        return await asyncio.to_thread(
            check_request, data, self.limits, self.worker.catalog.find, self.worker.is_multimodal
        )

    async def _answer(self, request: CheckedRequest, receive: Receive, send: Send) -> None:
        started, description = time.monotonic(), str(request)
        gone = threading.Event()
        leaving = asyncio.ensure_future(_left(receive))
        latest = LatestState()
        outcome = "a client left"
        try:
            # At once, not when a slot is free: the client sees that its request was accepted.
            headers = [(b"content-type", b"application/octet-stream"), (b"cache-control", b"no-store")]
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
            if await self._slot(leaving, send):
                self._begin(request, gone, latest)
                del request  # a client that reads slowly costs a state of its answer, not its request
                if await self._relay(latest, leaving, send):
                    outcome = "answered"
        except asyncio.TimeoutError:
            outcome = f"a client read nothing for {self.limits.stall_seconds:g} seconds"
        finally:
            gone.set()
            leaving.cancel()
            logger.info("%s after %.2f s: %s", outcome, time.monotonic() - started, description)

    async def _slot(self, leaving: asyncio.Future[Any], send: Send) -> bool:
        """Wait for a slot; return False if the client left first. However this ends, no slot is lost."""
        taking = asyncio.ensure_future(self.slots.acquire())
        taken = False
        try:
            while not taking.done() and not leaving.done():
                await _either(taking, leaving)
                if not taking.done() and not leaving.done():
                    await self._send(send, _body(KEEP_ALIVE))
            taken = taking.done() and taking.result() and not leaving.done()
            return taken
        finally:
            if not taken:
                taking.add_done_callback(self._give_back)
                taking.cancel()

    def _give_back(self, taking: asyncio.Future[Any]) -> None:
        if not taking.cancelled() and taking.exception() is None:
            self._release()

    def _begin(self, request: CheckedRequest, gone: threading.Event, latest: LatestState) -> None:
        """Pass the slot to a thread, which frees it when nothing is generated in it any more."""
        try:
            self._threads.submit(self._generate, request, gone, latest)
        except RuntimeError as error:  # the system has no more threads; one of the pool may still take it
            gone.set()
            logger.error("an answer could not be started: %s", error)
            latest.put(chunk(TOO_BUSY, FAILED))
            latest.close(self._release)

    def _generate(self, request: CheckedRequest, gone: threading.Event, latest: LatestState) -> None:
        """Generate in a thread, which never waits for the client."""
        last = b""
        try:
            if gone.is_set():
                return
            try:
                for last in self.worker.answer(request, gone):
                    latest.put(last)
            except Exception:  # otherwise only this thread's future would know of it
                logger.exception("an answer failed")
                last = chunk(NO_ANSWER, FAILED)
                latest.put(last)
            if self.log_requests:
                logger.info("prompt %r of %s: %s", request.parameters["prompt"], request.shown, last[:-1].decode())
        finally:
            latest.close(self._release)

    async def _relay(self, latest: LatestState, leaving: asyncio.Future[Any], send: Send) -> bool:
        """Send each state of the answer, or only the newest where the client is slower than the model.

        Returns:
            Whether the client has received all of it.
        """
        coming = asyncio.ensure_future(latest.get())
        try:
            while not leaving.done():
                await _either(coming, leaving)
                if not coming.done():
                    await self._send(send, _body(KEEP_ALIVE))
                    continue
                state = coming.result()
                await self._send(send, _body(state or b"", more=state is not None))
                if state is None:
                    return True
                coming = asyncio.ensure_future(latest.get())
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


async def _left(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


def build(
    worker: AdapterWorker,
    limits: Limits,
    *,
    log_requests: bool = False,
    admin: Sequence[Route] = (),
    allowed_hosts: Iterable[str] = (),
) -> Starlette:
    """Return the application.

    Args:
        allowed_hosts: names by which requests may call it, besides those of localhost and the worker's address.
        admin: the routes of `Admin.routes`, if /admin is turned on.
    """
    endpoint = StreamEndpoint(worker, limits, log_requests)

    async def status(request: Request) -> Response:
        return JSONResponse(worker.get_status())

    async def health(request: Request) -> Response:
        return JSONResponse(
            {
                "status": "ok",
                "models": len(worker.catalog.names()),
                "rejected": len(worker.catalog.rejected),
                "running": limits.running - endpoint.slots._value,
                "open": endpoint.open_requests,
                "rested": endpoint.trimmer.trimmed,
            }
        )

    async def http_error(request: Request, error: Exception) -> Response:
        code, detail = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, "")
        return refusal(code, detail or "The worker failed; its log says why.")

    app = Starlette(
        routes=[
            Route("/worker_generate_stream", endpoint, methods=["POST"]),
            Route("/worker_get_status", status, methods=["POST"]),
            Route("/health", health, methods=["GET"]),
            *admin,
        ],
        middleware=[Middleware(HostCheck, allowed=[host_of(worker.worker_addr), *allowed_hosts])],
        exception_handlers={HTTPException: http_error, Exception: http_error},
        lifespan=lambda _: endpoint.trimmer.following(worker.catalog),
    )
    app.state.endpoint = endpoint
    return app
