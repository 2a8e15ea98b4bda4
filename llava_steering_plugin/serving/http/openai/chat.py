"""Answers POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import io
import logging
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Message as AsgiMessage
from starlette.types import Receive, Scope, Send

from llava_steering_plugin.inference.context import PromptTokens
from llava_steering_plugin.inference.images import image_size
from llava_steering_plugin.serving.generation.request import GenerationRequest, new_id
from llava_steering_plugin.serving.http.admission import Admission
from llava_steering_plugin.serving.http.openai.answers import Completion
from llava_steering_plugin.serving.http.openai.errors import ApiError
from llava_steering_plugin.serving.http.openai.image_files import ImageFiles
from llava_steering_plugin.serving.http.openai.images import ImageSources
from llava_steering_plugin.serving.http.openai.models import Model, Models
from llava_steering_plugin.serving.http.openai.prompts import write
from llava_steering_plugin.serving.http.openai.schema import ChatRequest, checked
from llava_steering_plugin.serving.http.protocol import Refused, left, read_object
from llava_steering_plugin.serving.http.validation import MOST_TOKENS, check_image

if TYPE_CHECKING:
    from llava_steering_plugin.serving.model_worker import AdapterWorker

logger = logging.getLogger(__name__)

PING_SECONDS = 5  # between comments in a stream of which nothing has come yet
_ID = re.compile(r"[A-Za-z0-9._-]{1,100}")


class EventStream(EventSourceResponse):
    """A stream of events that the end of the server cuts off no earlier than other answers."""

    @staticmethod
    async def listen_for_exit_signal() -> None:
        """Wait for ever: sse-starlette's own event belongs to the first event loop that waits for it."""
        await asyncio.Event().wait()


class ChatEndpoint:
    """An ASGI application of its own, to notice when a client disconnects.

    Args:
        images: from where images may come.
        check: raises ApiError unless a request carries the key.
        log_requests: log messages and answers.
    """

    def __init__(
        self,
        worker: AdapterWorker,
        admission: Admission,
        models: Models,
        images: ImageSources,
        check: Callable[[Request], None],
        *,
        log_requests: bool = False,
    ):
        self._worker = worker
        self._admission = admission
        self._models = models
        self._images = ImageFiles(images, admission.limits)
        self._check = check
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        given = request.headers.get("x-request-id", "")
        name = f"chatcmpl-{given if _ID.fullmatch(given) else new_id()}"
        started, outcome = time.monotonic(), "a client left"

        async def named(message: AsgiMessage) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        try:
            self._check(request)
            with ExitStack() as admitted:
                admitted.enter_context(self._admission.admitted())
                with self._admission.slots.arriving():
                    chat = await self._read(request)
                    files = await self._files(chat, receive)
                    completion, streamed = await self._asked(chat, files, name, admitted)
                    del chat, files  # a client that reads slowly costs its answers, not its request
                outcome = await self._answer(completion, streamed, (scope, receive, named))
                if self._log_requests:
                    logger.info("%s: answers %r", name, [choice.text for choice in completion.choices])
        except Refused as refused:
            error = ApiError.of(refused)
            outcome = f"refused with {error.status} ({error.code})"
            await error.response()(scope, receive, named)
        except ClientDisconnect:
            outcome = "a client left before its request, or an image of it, had arrived"
        finally:
            logger.info("%s: %s after %.2f s", name, outcome, time.monotonic() - started)

    async def _read(self, request: Request) -> ChatRequest:
        data = await read_object(request, self._admission.limits)
        return await asyncio.to_thread(checked, ChatRequest, data)

    async def _asked(
        self, chat: ChatRequest, files: list[bytes], name: str, admitted: ExitStack
    ) -> tuple[Completion, bool]:
        """Return the answers to a request, which nothing of the request is kept for, and whether to stream them."""
        model = self._models.find(chat.model)
        requests = await asyncio.to_thread(self._requests, chat, model, files, name)
        if chat.n > 1:
            admitted.enter_context(self._admission.admitted(chat.n - 1))
        logger.info("%s: asks %s, with %d image(s), for %d answer(s)", name, model.id, len(files), chat.n)
        if self._log_requests:
            logger.info("%s: messages %r", name, [(message.role, message.text) for message in chat.messages])
        include_usage = chat.stream_options is not None and chat.stream_options.include_usage
        answers = [self._admission.slots.ask(request) for request in requests]
        return Completion(name, model.id, answers, include_usage), chat.stream

    async def _files(self, chat: ChatRequest, receive: Receive) -> list[bytes]:
        """Return the files of all images, as they are.

        Raises:
            ApiError: there is no such model, too much is asked for, or some images cannot be read.
            ClientDisconnect: nobody waits for them any more.
        """
        self._models.find(chat.model)
        if chat.n > (most := self._admission.limits.answers):
            raise ApiError(400, f"n has to be {most} at most: this server makes no more answers at once.", param="n")
        places = [
            (f"messages[{number}].{place}", url)
            for number, message in enumerate(chat.messages)
            for place, url in message.images
        ]
        if not places:
            return []
        if not self._worker.is_multimodal:
            raise ApiError(400, "This model takes no images.", param="messages")
        if len(places) > self._admission.limits.images:
            raise ApiError(400, f"The request has more than {self._admission.limits.images} images.", param="messages")
        return await self._images.read(places, receive)

    def _requests(self, chat: ChatRequest, model: Model, files: list[bytes], name: str) -> list[GenerationRequest]:
        """Check messages and images, and return what to generate: a request for each choice.

        Raises:
            Refused: they are too long (413, 400), wrong or damaged (400).
        """
        limits = self._admission.limits
        if sum(len(message.text) for message in chat.messages) > limits.prompt_characters:
            raise ApiError(413, f"The messages are longer than {limits.prompt_characters:,} characters.")
        for number, file in enumerate(files, start=1):
            check_image(file, number, limits)
        config = self._worker.pool.config_of(model.adapter)
        prompt = write(chat.messages, model.template, self._worker.tokenizer, config)
        tokens = PromptTokens.of_model(self._worker.model)
        length = tokens.count(prompt.ids, [image_size(io.BytesIO(file)) for file in files])
        most, positions = tokens.context.prompt(bool(files)), tokens.context.positions
        if most is not None and length > most:
            raise ApiError(
                400,
                f"The messages have {length:,} tokens, images included; this model takes {most:,}.",
                code="context_length_exceeded",
                param="messages",
            )
        room = positions - length if positions is not None else MOST_TOKENS
        return [
            GenerationRequest(
                adapter=model.adapter,
                prompt=prompt.ids,
                template=model.recorded,
                images=tuple(files),
                max_new_tokens=min(chat.tokens or room, room),
                temperature=chat.temperature,
                top_p=chat.top_p,
                stop=tuple(filter(None, [*chat.stop, prompt.stop])),
                seed=None if chat.seed is None else chat.seed + number,
                id=name if chat.n == 1 else f"{name}-{number}",
            )
            for number in range(chat.n)
        ]

    async def _answer(self, completion: Completion, streamed: bool, channel: tuple[Scope, Receive, Send]) -> str:
        """Answer; return how it ended, for the log."""
        try:
            if streamed:
                await completion.begin(PING_SECONDS)
                stall = self._admission.limits.stall_seconds
                await EventStream(completion.stream(), ping=PING_SECONDS, send_timeout=stall)(*channel)
                return completion.outcome
            leaving = asyncio.ensure_future(left(channel[1]))
            making = asyncio.ensure_future(completion.whole())
            try:
                await asyncio.wait({leaving, making}, return_when=asyncio.FIRST_COMPLETED)
                if making.done():
                    await JSONResponse(making.result())(*channel)
            finally:
                leaving.cancel()
                making.cancel()
            return completion.outcome
        except Exception as error:
            if not _stalled(error):
                raise
            return "a client read nothing of its answer"
        finally:
            completion.cancel()


def _stalled(error: BaseException) -> bool:
    """Return whether an error, or a group of them, is that a client has stopped to read."""
    inner = getattr(error, "exceptions", None)
    return all(map(_stalled, inner)) if inner else isinstance(error, SendTimeoutError)
