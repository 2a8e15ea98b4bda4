"""Let gloo's threads run only when their rank does nothing else, on one processor, as on a busy machine.

Python imports this before any program whose path has this folder; `starved` in ranks.py puts it there.
"""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path


def starve() -> None:
    """Starve the threads that this process has now."""
    processors = sorted(os.sched_getaffinity(0))
    processor = processors[int(os.environ["RANK"]) % len(processors)]
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # the thread has ended
            os.sched_setaffinity(int(thread.name), {processor})
            if "gloo_runloop" in (thread / "comm").read_text():
                os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))


def keep_starving() -> None:
    while True:
        starve()
        time.sleep(0.2)


if "RANK" in os.environ:
    threading.Thread(target=keep_starving, daemon=True).start()
