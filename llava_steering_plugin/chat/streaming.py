"""An answer while it is made: its text word by word, where it ends, and how fast it came."""

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
    """What an answer took.

    Attributes:
        prompt_tokens: positions of the prefill, image positions among them.
        prefill_seconds: until the first token was there, the vision tower's time included; None if none came.
        tokens: that were made.
        decode_seconds: from the first token to the last.
    """

    prompt_tokens: int
    prefill_seconds: float | None
    tokens: int
    decode_seconds: float

    def __str__(self) -> str:
        if self.prefill_seconds is None:
            return "no token was made"
        shown = f"prefill {self.prompt_tokens:,} tokens in {self.prefill_seconds * 1000:,.0f} ms"
        if self.tokens > 1 and self.decode_seconds > 0:
            shown += f" · decode {self.tokens:,} tokens, {(self.tokens - 1) / self.decode_seconds:,.1f} tokens/s"
        return shown


class AnswerStreamer(TextStreamer):
    """Hands on the text of an answer in whole words, up to the template's stop text, and keeps the time.

    Args:
        stop: the text at which the answer ends where the model goes on; "" for none. Holds no space.
        show: takes each new piece of text.
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
        """Takes the prompt's ids, which are passed over, and then one token at a time."""
        if not self.next_tokens_are_prompt:
            self.last = time.perf_counter()
            self.first = self.last if not self.tokens else self.first
            self.tokens += 1
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.ended:
            return
        if self.stop and self.stop in text:
            text = text.partition(self.stop)[0]
            self.ended = True
        self.text += text
        if text:
            self.show(text)

    def speed(self) -> Speed:
        seconds = self.first - self.started if self.tokens else None
        return Speed(self.prompt_tokens, seconds, self.tokens, self.last - self.first)

    @contextmanager
    def watching(self, stack: Any) -> Iterator[None]:
        """Inside the block, counts the positions of the first pass through the decoder `stack`."""

        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Ids or embeddings; transformers gives the other one as None.
            given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            lengths = [tensor.shape[1] for tensor in given if tensor is not None]
            self.prompt_tokens = self.prompt_tokens or lengths[0]

        handle = stack.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


class Ended(StoppingCriteria):
    """Ends a generation whose streamer has seen the stop text, or that somebody interrupted."""

    def __init__(self, streamer: AnswerStreamer):
        self.streamer = streamer
        self.interrupted = False

    def interrupt(self) -> None:
        self.interrupted = True

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> bool:
        return self.interrupted or self.streamer.ended


@contextmanager
def first_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Inside the block, the first Ctrl-C calls `stop`; the next one raises KeyboardInterrupt as usual.

    Between two tokens nothing is half done; only the second Ctrl-C can fall into a pass through the model.
    """
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to no other
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
