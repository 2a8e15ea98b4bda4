"""Streams an answer: its text word by word, where it ends, and how long it took."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor
from transformers import StoppingCriteria, TextStreamer


@dataclass(frozen=True)
class Speed:
    """The time that an answer took.

    Attributes:
        prompt_tokens: length of the prefill, with the image's tokens.
        prefill_seconds: time to the first token, with the vision tower's; None if no token was generated.
        tokens: number of generated tokens.
        decode_seconds: time from the first token to the last.
    """

    prompt_tokens: int
    prefill_seconds: float | None
    tokens: int
    decode_seconds: float

    def __str__(self) -> str:
        if self.prefill_seconds is None:
            return "no token was generated"
        shown = f"prefill {self.prompt_tokens:,} tokens in {self.prefill_seconds * 1000:,.0f} ms"
        if self.tokens > 1 and self.decode_seconds > 0:
            shown += f" · decode {self.tokens:,} tokens, {(self.tokens - 1) / self.decode_seconds:,.1f} tokens/s"
        return shown


class AnswerStreamer(TextStreamer):
    """Passes on the text of an answer in whole words, up to the template's stop text, and takes the time.

    Args:
        stop: the text at which the answer ends even if the model goes on; "" for none. Contains no space.
        show: called with each new piece of text.
    """

    def __init__(self, tokenizer: Any, stop: str, show: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop = stop
        self.show = show
        self.text = ""
        self.ended = False
        self.prompt_tokens = 0
        self.tokens = 0
        self.started = self.first = self.last = time.perf_counter()

    def put(self, value: Tensor) -> None:
        """Take the prompt's ids first, which are skipped, then one token at a time."""
        if not self.next_tokens_are_prompt:
            self.last = time.perf_counter()
            self.first = self.last if not self.tokens else self.first
            self.tokens += 1
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show a piece of text, up to the stop text."""
        if self.ended:
            return
        if self.stop and self.stop in text:
            text = text.partition(self.stop)[0]
            self.ended = True
        self.text += text
        if text:
            self.show(text)

    def speed(self) -> Speed:
        """Return the time that the answer has taken so far."""
        seconds = self.first - self.started if self.tokens else None
        return Speed(self.prompt_tokens, seconds, self.tokens, self.last - self.first)

    @contextmanager
    def watching(self, stack: Any) -> Iterator[None]:
        """Count the positions of the first pass through the decoder `stack` inside the block."""

        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Either ids or embeddings; transformers passes the other one as None.
            given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            lengths = [tensor.shape[1] for tensor in given if tensor is not None]
            self.prompt_tokens = self.prompt_tokens or lengths[0]

        handle = stack.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


class AnswerStop(StoppingCriteria):
    """Ends a generation when its streamer has seen the stop text, or after `interrupt`."""

    def __init__(self, streamer: AnswerStreamer):
        self.streamer = streamer
        self.interrupted = False

    def interrupt(self) -> None:
        """End the generation after the present token."""
        self.interrupted = True

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> bool:
        return self.interrupted or self.streamer.ended


@contextmanager
def first_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at the first Ctrl-C inside the block; the next one raises KeyboardInterrupt as usual.

    So the first Ctrl-C ends the answer between two tokens; only the second can interrupt a pass through the model.
    """
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
