"""Gives memory that a worker no longer uses back to the system, when no answer is being generated.

glibc keeps what a thread has freed for that thread's arena, and after the first large block was freed it keeps blocks
of up to 32 MB, too. A worker has several threads for its answers, and now and then a request of many megabytes: twenty
requests of 10 MB left 140 MB behind, and 7 MB with these settings.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from llava_steering_plugin.serving.catalog import AdapterCatalog

logger = logging.getLogger(__name__)

# From malloc.h. psutil has no mallopt.
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
LARGE_BYTES, ARENAS = 4 << 20, 4
# How many compiled operations oneDNN keeps, and how many descriptions of operations each thread of torch. The default
# of both is 1024.
KEPT_OPERATIONS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "16"}
IDLE_SECONDS = 1.0


def return_large_blocks() -> None:
    """Make the C library return large blocks to the system when they are freed, and threads share a few arenas.

    Call it before many threads have started. It has no effect where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return
    for option, value in ((M_MMAP_THRESHOLD, LARGE_BYTES), (M_ARENA_MAX, ARENAS)):
        if not library.mallopt(option, value):
            logger.warning("the C library refuses mallopt(%d, %d); the worker may keep memory", option, value)
    if not hasattr(psutil, "heap_trim"):
        logger.warning(
            "psutil %s cannot trim the heap; the worker may keep memory. Install psutil>=7.2", psutil.__version__
        )


def keep_few_operations() -> None:
    """Make the libraries that compute on CPUs cache fewer operations, unless the environment already says how many.

    They make one of 250 KB for every shape, and to a worker nearly every length of a prompt and of a cache is a new
    shape. Call it before anything is computed.
    """
    for variable, number in KEPT_OPERATIONS.items():
        os.environ.setdefault(variable, number)


def return_free_memory() -> None:
    """Collect garbage and return free memory of the heap to the system. This takes a moment.

    Python looks for objects that refer to each other in a circle only now and then, the less often the larger a program
    is. A refused request hangs on its exception in such a circle, with all of its megabytes.
    """
    gc.collect()
    if hasattr(psutil, "heap_trim"):  # only where the C library can
        psutil.heap_trim()


class IdleTrimmer:
    """Returns free memory soon after the last answer has ended or an adapter has changed. For the event loop.

    Args:
        is_idle: says whether no request is being handled.

    Attributes:
        trimmed: nothing has happened since memory was last returned.
    """

    def __init__(self, is_idle: Callable[[], bool]):
        self.trimmed = True
        self._is_idle = is_idle
        self._timer: asyncio.TimerHandle | None = None

    def schedule(self) -> None:
        """Return memory soon, if the worker is idle then; call it whenever something has ended."""
        self.trimmed = False
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._trim)

    @asynccontextmanager
    async def following(self, catalog: AdapterCatalog) -> AsyncIterator[None]:
        """Return memory after changes of adapters, too, inside the block: they free memory without any request."""
        loop = asyncio.get_running_loop()

        def changed() -> None:  # called in the thread that changed an adapter
            with suppress(RuntimeError):  # the loop has been closed: the server has stopped
                loop.call_soon_threadsafe(self.schedule)

        catalog.followers.append(changed)
        try:
            yield
        finally:
            catalog.followers.remove(changed)

    def _trim(self) -> None:
        self._timer = None
        if self._is_idle():
            trimming = asyncio.get_running_loop().run_in_executor(None, return_free_memory)
            trimming.add_done_callback(self._note)

    def _note(self, _: asyncio.Future[None]) -> None:
        self.trimmed = self._timer is None and self._is_idle()  # False if something happened in the meantime
