"""The worker's HTTP side: upstream's two routes, /health, and /admin where it is switched on.

Upstream's own routes take any body, stop the event loop while they call the controller, and go on generating for
clients that have gone. These keep to limits, answer errors in upstream's form, and hold a slot exactly as long as
something is generated in it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llava_steering_plugin.serving.http.latest import LatestState
from llava_steering_plugin.serving.http.limits import Limits
from llava_steering_plugin.serving.http.protocol import FAILED, NO_ANSWER, Refused, chunk, read_object, refusal
from llava_steering_plugin.serving.http.validation import CheckedRequest, checked
from llava_steering_plugin.serving.idle_trimmer import IdleTrimmer

if TYPE_CHECKING:
    from llava_steering_plugin.serving.model_worker import AdapterWorker

logger = logging.getLogger(__name__)

# Between the states of an answer every client of upstream's skips empty ones. One every few seconds keeps the page
# (10 seconds of patience) and the controller (5) waiting while an answer queues or its prefill takes long.
KEEP_WAITING, KEEP_WAITING_SECONDS = b"\0", 3.0


class StreamEndpoint:
    """POST /worker_generate_stream, as an ASGI application of its own: it has to see the client go.

    Attributes:
        inside: requests that have come and are not answered yet, waiting ones too.
        slots: one for each answer that may be generated at a time.
        resting: gives memory back when nothing is going on.
    """

    def __init__(self, worker: AdapterWorker, limits: Limits, log_requests: bool = False):
        self.worker = worker
        self.limits = limits
        self.log_requests = log_requests
        self.inside = 0
        self.slots = asyncio.Semaphore(limits.running)
        # Threads that stay, like those that generate: a new one for every answer would leave its memory behind.
        self._threads = ThreadPoolExecutor(limits.running, "answering")
        worker.report(self.slots, limits.running)
        self.resting = IdleTrimmer(self._idle)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._admitted():
                await self._answer(await self._checked(Request(scope, receive)), receive, send)
        except Refused as refused:
            logger.info("refused with %d: %s", refused.status, refused.text)
            await refused.response()(scope, receive, send)
        except ClientDisconnect:
            logger.info("a client left before its request had come")

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self.inside >= self.limits.running + self.limits.waiting:
            raise Refused(503, "The worker has too much to do. Please try again in a moment.")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1
            self.resting.soon()

    def _release(self) -> None:
        """Nothing is generated in a slot any more."""
        self.slots.release()
        self.resting.soon()

    def _idle(self) -> bool:
        return not self.inside and self.slots._value == self.limits.running

    async def _checked(self, request: Request) -> CheckedRequest:
        data = await read_object(request, self.limits)
        return await asyncio.to_thread(checked, data, self.limits, self.worker.catalog.find, self.worker.is_multimodal)

    async def _answer(self, asked: CheckedRequest, receive: Receive, send: Send) -> None:
        started, what = time.monotonic(), str(asked)
        gone = threading.Event()
        leaving = asyncio.ensure_future(_left(receive))
        latest = LatestState()
        how = "a client left"
        try:
            # Now, not when a slot is free: the client knows that it has been heard.
            headers = [(b"content-type", b"application/octet-stream"), (b"cache-control", b"no-store")]
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
            if await self._slot(leaving, send):
                self._begin(asked, gone, latest)
                del asked  # a client that reads slowly costs a state of its answer, and not what it has asked
                if await self._relay(latest, leaving, send):
                    how = "answered"
        except asyncio.TimeoutError:
            how = f"a client took nothing for {self.limits.stall_seconds:g} seconds"
        finally:
            gone.set()
            leaving.cancel()
            logger.info("%s after %.2f s: %s", how, time.monotonic() - started, what)

    async def _slot(self, leaving: asyncio.Future[Any], send: Send) -> bool:
        """Waits for a slot; False if the client left first. However this ends, no slot is lost."""
        taking = asyncio.ensure_future(self.slots.acquire())
        taken = False
        try:
            while not taking.done() and not leaving.done():
                await _either(taking, leaving)
                if not taking.done() and not leaving.done():
                    await self._send(send, _body(KEEP_WAITING))
            taken = taking.done() and taking.result() and not leaving.done()
            return taken
        finally:
            if not taken:
                taking.add_done_callback(self._give_back)
                taking.cancel()

    def _give_back(self, taking: asyncio.Future[Any]) -> None:
        if not taking.cancelled() and taking.exception() is None:
            self._release()

    def _begin(self, asked: CheckedRequest, gone: threading.Event, latest: LatestState) -> None:
        """Hands the slot to a thread: it is free when nothing is generated in it any more."""
        try:
            self._threads.submit(self._generate, asked, gone, latest)
        except RuntimeError as error:  # the system has no more threads; one of those there are may still take it
            gone.set()
            logger.error("an answer could not be begun: %s", error)
            latest.put(chunk("The worker has too much to do. Please try again in a moment.", FAILED))
            latest.close(self._release)

    def _generate(self, asked: CheckedRequest, gone: threading.Event, latest: LatestState) -> None:
        """In a thread, which never waits for the client."""
        last = b""
        try:
            if gone.is_set():
                return
            try:
                for last in self.worker.answer(asked, gone):
                    latest.put(last)
            except Exception:  # whatever it is, only this thread's future would know, and nobody looks there
                logger.exception("an answer failed")
                last = chunk(NO_ANSWER, FAILED)
                latest.put(last)
            if self.log_requests:
                logger.info("prompt %r of %s: %s", asked.parameters["prompt"], asked.shown, last[:-1].decode())
        finally:
            latest.close(self._release)

    async def _relay(self, latest: LatestState, leaving: asyncio.Future[Any], send: Send) -> bool:
        """Sends each state of the answer, or only the newest where the client is slower than the model.

        Returns:
            Whether the client got all of it.
        """
        coming = asyncio.ensure_future(latest.get())
        try:
            while not leaving.done():
                await _either(coming, leaving)
                if not coming.done():
                    await self._send(send, _body(KEEP_WAITING))
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
        """Raises asyncio.TimeoutError for a client that has stopped to read."""
        await asyncio.wait_for(send(message), self.limits.stall_seconds)


def give_up_stalled(listener: socket.socket, seconds: float) -> None:
    """Has the kernel close connections whose peers take nothing: closing them here would wait for the peer.

    Connections take this over from the socket that listens. Linux only; elsewhere they stay until the peer goes.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


def _body(content: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


async def _either(first: asyncio.Future[Any], second: asyncio.Future[Any]) -> None:
    """Waits for one of them, but not for longer than a client does that hears nothing."""
    futures: set[asyncio.Future[Any]] = {first, second}
    await asyncio.wait(futures, timeout=KEEP_WAITING_SECONDS, return_when=asyncio.FIRST_COMPLETED)


async def _left(receive: Receive) -> None:
    """Ends when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


def build(
    worker: AdapterWorker, limits: Limits, *, log_requests: bool = False, admin: Sequence[Route] = ()
) -> Starlette:
    """The application.

    Args:
        admin: the routes of `admin.routes`, where the server may be administered.
    """
    answers = StreamEndpoint(worker, limits, log_requests)

    async def status(request: Request) -> Response:
        return JSONResponse(worker.get_status())

    async def health(request: Request) -> Response:
        return JSONResponse(
            {
                "status": "ok",
                "models": len(worker.catalog.names()),
                "rejected": len(worker.catalog.rejected),
                "running": limits.running - answers.slots._value,
                "open": answers.inside,
                "rested": answers.resting.rested,
            }
        )

    async def http_error(request: Request, error: Exception) -> Response:
        code, detail = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, "")
        return refusal(code, detail or "The worker failed; its log says why.")

    app = Starlette(
        routes=[
            Route("/worker_generate_stream", answers, methods=["POST"]),
            Route("/worker_get_status", status, methods=["POST"]),
            Route("/health", health, methods=["GET"]),
            *admin,
        ],
        exception_handlers={HTTPException: http_error, Exception: http_error},
        lifespan=lambda _: answers.resting.following(worker.catalog),
    )
    app.state.endpoint = answers
    return app
