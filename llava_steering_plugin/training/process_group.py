"""Leave torch's process group before Python ends, which transformers' Trainer and LLaVA do not."""

from __future__ import annotations

import atexit
import gc
import os
import time
from pathlib import Path

from torch import distributed

# Threads that still work after that long do something else, such as writing a log.
AT_MOST_SECONDS = 5.0
_THREADS = Path("/proc/self/task")


def leave_at_exit() -> None:
    """Let this process leave its process group when it ends. Call it after a training that went well.

    gloo's threads may still hold a tensor of the last exchange. One that releases it while Python shuts down aborts
    the process ("terminate called without an active exception", pytorch issue 190489), and the launcher then ends the
    other ranks, whether or not they have saved. A training that failed leaves nothing: others may wait in an exchange.
    """
    atexit.unregister(_leave)
    atexit.register(_leave)  # what was registered last runs first


def _leave() -> None:
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    gc.collect()  # the threads end with the group's last owner; DDP and the trainer own it, in a cycle
    distributed.destroy_process_group()
    _let_threads_finish()  # DeepSpeed's engine is never freed, nor are its groups


def _let_threads_finish() -> None:
    """Return when all other threads of this process sleep, twice in a row: the first time one may wait for Python."""
    end = time.monotonic() + AT_MOST_SECONDS
    asleep = 0
    while asleep < 2 and time.monotonic() < end:
        asleep = 0 if _working() else asleep + 1
        time.sleep(0.001)  # lets them have Python's lock


def _working() -> bool:
    """Say whether another thread of this process runs or could run; on systems other than Linux, that none does."""
    main = str(os.getpid())
    for thread in _THREADS.iterdir() if _THREADS.is_dir() else ():
        try:
            state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has ended
            continue
        if thread.name != main and state in "RD":
            return True
    return False
