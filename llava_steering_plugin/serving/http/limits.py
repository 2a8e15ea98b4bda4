"""What one worker takes on."""

from __future__ import annotations

from dataclasses import dataclass

SPARE_CONNECTIONS = 64


@dataclass(frozen=True)
class Limits:
    """The most that is answered, waits and is read.

    Attributes:
        running: requests that are answered at a time; as upstream's --limit-model-concurrency.
        waiting: requests that may wait for one of these; more are told to come back (503).
        body_bytes: of a request; images arrive in it as base64.
        prompt_characters: the tokenizer is not given more than this, whatever the context would hold.
        images, image_pixels: of a request, and of each image once it is unpacked.
        receive_seconds: in which a request has to be there.
        stall_seconds: after which a client that takes nothing more of its answer is given up.
    """

    running: int = 5
    waiting: int = 64
    body_bytes: int = 16 << 20
    prompt_characters: int = 65_536
    images: int = 8
    image_pixels: int = 40_000_000
    receive_seconds: float = 60.0
    stall_seconds: float = 60.0

    @property
    def connections(self) -> int:
        """How many may be open before uvicorn answers 503: those of all requests, and some for health and the like."""
        return self.running + self.waiting + SPARE_CONNECTIONS
