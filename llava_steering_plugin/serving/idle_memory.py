"""Has the C library give memory back that a worker no longer uses.

glibc keeps what a thread has freed for that thread's arena, and after the first large block was freed it keeps blocks
of up to 32 MB, too. A worker has several threads for its answers, and now and then a request of many megabytes: twenty
requests of 10 MB left 140 MB behind, and 7 MB with these settings.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import logging
import os
import sys

logger = logging.getLogger(__name__)

# From malloc.h.
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
LARGE_BYTES, ARENAS = 4 << 20, 4
# How many operations are kept by oneDNN, compiled, and how many by each thread of torch, described. Both keep 1024
# unless told otherwise.
KEPT_OPERATIONS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "16"}


def give_large_blocks_back() -> None:
    """Large blocks go back to the system when they are freed, and threads share a few arenas.

    To be called before many threads have started. Without effect where the C library is not glibc.
    """
    library = _glibc()
    if library is None:
        return
    for option, value in ((M_MMAP_THRESHOLD, LARGE_BYTES), (M_ARENA_MAX, ARENAS)):
        if not library.mallopt(option, value):
            logger.warning("the C library refuses mallopt(%d, %d); the worker may keep memory", option, value)


def keep_few_operations() -> None:
    """Has the libraries that compute on CPUs keep fewer of the operations that they have made.

    They make one for every shape, of 250 KB each, and to a worker nearly every length of a prompt and of what is cached
    is a new shape. To be called before anything is computed; numbers in the environment go before these.
    """
    for variable, number in KEPT_OPERATIONS.items():
        os.environ.setdefault(variable, number)


def give_free_pages_back() -> None:
    """What nobody uses goes back, too: takes a moment, so it is for times of rest.

    Python finds objects that refer to each other in a circle only now and then, the less often the larger a program is;
    a refused request hangs on its exception that way, with all of its megabytes.
    """
    gc.collect()
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
