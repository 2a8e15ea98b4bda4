"""Replaces in LLaVA's model worker the names by which it generates: its streamer, its threads, its reader of images.

Upstream's `ModelWorker.generate_stream` looks these names up in its module. Nothing else of the module changes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llava import utils as llava_utils

# Importing upstream's worker would turn standard output and error into log records and open a log file in the current
# folder. Keep both as they are.
llava_utils.handler = llava_utils.handler or logging.NullHandler()
with contextlib.redirect_stdout(sys.stdout), contextlib.redirect_stderr(sys.stderr):
    from llava.serve import model_worker as model_worker
model_worker.logger.setLevel(logging.WARNING)  # otherwise it logs a line for each heart beat


class PatientStreamer(model_worker.TextIteratorStreamer):
    """Waits for text for as long as generating takes; upstream's streamer gives up after 15 seconds without text.

    A long prefill or a busy machine can take longer. Whoever generates must call `finish` in every case: transformers
    ends the text before it is known whether the generation has failed, and the reader would not learn of it.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **(kwargs | {"timeout": None}))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass a piece of text on; the last one ends nothing."""
        super().on_finalized_text(text)

    def finish(self) -> None:
        """End the stream for its reader."""
        self.text_queue.put(self.stop_signal)


class PooledThread:
    """Runs in a pool of threads what upstream starts as a new thread for every generation.

    Each new thread would leave memory of its own behind in the libraries that compute.

    Attributes:
        threads: the pool, as large as the server has slots once `set_threads` was called. A slot is free a moment
            before its thread, when that has ended the stream: the next generation waits for that moment.
    """

    threads = ThreadPoolExecutor(thread_name_prefix="generating")

    def __init__(self, *, target: Callable[..., Any], kwargs: dict[str, Any]):
        self._work = functools.partial(target, **kwargs)

    def start(self) -> None:
        """Hand the work to the pool.

        Raises:
            RuntimeError: the system has no more threads; one of the pool's may do the work all the same, later.
        """
        self.threads.submit(self._work)


def replace_parts(load_image: Callable[[Any], Any], process_images: Callable[..., Any]) -> None:
    """Make upstream's worker generate in pooled threads and wait for text patiently; give it our functions for images.

    Args:
        load_image: in place of upstream's `load_image_from_base64`.
        process_images: in place of its function of that name.
    """
    model_worker.TextIteratorStreamer = PatientStreamer
    model_worker.Thread = PooledThread
    model_worker.load_image_from_base64 = load_image
    model_worker.process_images = process_images


def set_threads(count: int) -> None:
    """Run up to `count` generations at a time."""
    PooledThread.threads = ThreadPoolExecutor(count, "upstream")
