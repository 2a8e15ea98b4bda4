"""The limits within which one worker accepts requests."""

from __future__ import annotations

from dataclasses import dataclass

SPARE_CONNECTIONS = 64


@dataclass(frozen=True)
class Limits:
    """The most that a worker accepts.

    Attributes:
        running: batches generated at the same time; upstream's --limit-model-concurrency.
        batch: answers of a batch.
        waiting: requests that may wait for their turn; further ones get status 503.
        body_bytes: largest request; images arrive in it as base64.
        prompt_characters: longest prompt that the tokenizer is given.
        images, image_pixels: images of a request, and pixels of each when decoded.
        receive_seconds: time in which a request has to arrive.
        stall_seconds: time after which a client that reads nothing more of its answer is disconnected.
    """

    running: int = 5
    batch: int = 8
    waiting: int = 64
    body_bytes: int = 16 << 20
    prompt_characters: int = 65_536
    images: int = 8
    image_pixels: int = 40_000_000
    receive_seconds: float = 60.0
    stall_seconds: float = 60.0

    @property
    def answers(self) -> int:
        """The most answers that can be open: all batches are full, and the queue is."""
        return self.running * self.batch + self.waiting

    @property
    def connections(self) -> int:
        """Open connections above which uvicorn answers 503: those of all requests, and some spare ones for /health."""
        return self.answers + SPARE_CONNECTIONS
