"""Answers as OpenAI's clients read them: one object at the end, or a stream of pieces."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_steering_plugin.serving.generation.answer import Answer
from llava_steering_plugin.serving.generation.request import BUSY, End, Event, Piece, Problem
from llava_steering_plugin.serving.http.openai.errors import ApiError

DONE = "[DONE]"
ERRORS = {
    Problem.TOO_LONG: (400, "", "context_length_exceeded"),
    Problem.GONE: (404, "This model is no longer served; GET /v1/models lists those that are.", "model_not_found"),
    Problem.REPLACED: (503, "", "model_replaced"),
    Problem.NOT_FINITE: (500, "This model has no answer: its numbers became infinite.", "not_finite"),
    Problem.FAILED: (500, "", "generation_failed"),
    Problem.STOPPED: (503, "", "server_stopping"),
}


def error_of(end: End) -> ApiError:
    """Return the error of an answer that did not come to its end."""
    if end.problem is None:  # the server stops
        return ApiError(503, BUSY, code="cancelled")
    status, text, code = ERRORS[end.problem]
    return ApiError(503, BUSY) if end.message == BUSY else ApiError(status, text or end.message, code=code)


@dataclass
class Choice:
    """One of the answers to a request.

    Attributes:
        text: so far, without white space in front: templates have that before an answer.
        end: once it has ended.
    """

    text: str = ""
    end: End | None = None

    def add(self, event: Event) -> str:
        """Take an event; return the text that it brings.

        Raises:
            ApiError: the answer has failed.
        """
        if isinstance(event, End):
            if event.finish_reason not in ("stop", "length"):
                raise error_of(event)
            self.end = event
            return ""
        new = event.text if self.text else event.text.lstrip()
        self.text += new
        return new


@dataclass
class Completion:
    """The answers to a request.

    Attributes:
        id: of the request, in answers and logs.
        model: as the client called it.
        include_usage: tell at the end of a stream how many tokens there were.
    """

    id: str
    model: str
    answers: Sequence[Answer]
    include_usage: bool = False
    choices: list[Choice] = field(init=False)
    failed: ApiError | None = field(default=None, init=False)
    _first: asyncio.Future[tuple[int, Event]] | None = field(default=None, init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.choices = [Choice() for _ in self.answers]
        self._coming = _merged(self.answers)

    @property
    def outcome(self) -> str:
        """The way in which it ended, for the log."""
        if self.failed is not None:
            return f"failed ({self.failed.code})"
        return "answered" if all(choice.end is not None for choice in self.choices) else "a client left"

    def cancel(self) -> None:
        """Say that nobody waits for the rest."""
        for answer in self.answers:
            answer.cancel()
        if self._first is not None:
            self._first.cancel()

    async def begin(self, seconds: float) -> None:
        """Wait for the first event, but not for longer than that: an error that comes first still has a status.

        Raises:
            ApiError: it is an error.
        """
        self._first = asyncio.ensure_future(anext(self._coming))
        done, _ = await asyncio.wait({self._first}, timeout=seconds)
        if done and isinstance(end := self._first.result()[1], End):
            Choice().add(end)

    async def _events(self) -> AsyncIterator[tuple[int, Event]]:
        if self._first is not None:
            yield await self._first
        async for each in self._coming:
            yield each

    async def whole(self) -> dict[str, Any]:
        """Wait for all answers and return them.

        Raises:
            ApiError: one has failed.
        """
        async for number, event in self._events():
            self.choices[number].add(event)
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": choice.text},
                "logprobs": None,
                "finish_reason": choice.end.finish_reason if choice.end is not None else None,
            }
            for number, choice in enumerate(self.choices)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage()}

    async def stream(self) -> AsyncIterator[str]:
        """Yield the data of each server-sent event, the last one included; an error is one of them."""
        begun: set[int] = set()
        try:
            async for number, event in self._events():
                new = self.choices[number].add(event)
                if number not in begun:
                    begun.add(number)
                    yield self._chunk(number, {"role": "assistant", "content": ""})
                if isinstance(event, Piece):
                    if new:
                        yield self._chunk(number, {"content": new})
                else:
                    yield self._chunk(number, {}, event.finish_reason)
            if self.include_usage:
                yield _json({**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage()})
        except ApiError as error:
            self.failed = error
            self.cancel()
            yield _json(error.body())
        yield DONE

    def usage(self) -> dict[str, int]:
        """Return the numbers of tokens; those of the prompt count once."""
        ends = [choice.end for choice in self.choices if choice.end is not None]
        prompt = max((end.prompt_tokens for end in ends), default=0)
        made = sum(end.completion_tokens for end in ends)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, number: int, delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": number, "delta": delta, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self.include_usage else {}
        return _json({**self._head("chat.completion.chunk"), "choices": [choice], **usage})


async def _merged(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, Event], None]:
    """Yield the events of all answers as they come, but for those without text, each with the number of its answer."""
    coming = {asyncio.ensure_future(answer.next()): number for number, answer in enumerate(answers)}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for future in sorted(done, key=coming.__getitem__):
                number, event = coming.pop(future), future.result()
                if isinstance(event, End) or event.text:
                    yield number, event
                if not isinstance(event, End):
                    coming[asyncio.ensure_future(answers[number].next())] = number
    finally:
        for future in coming:
            future.cancel()


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))
