"""Keeps what LLaVA's libraries log out of a chat and out of progress bars.

Importing it imports no torch: `--help` needs none.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LIBRARIES = ("bitsandbytes", "DeepSpeed")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide what LLaVA's libraries log at every load, as `quieten_libraries` does, inside the block."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    levels = {name: logging.getLogger(name).level for name in _LIBRARIES}
    with warnings.catch_warnings():
        quieten_libraries()
        try:
            yield
        finally:
            transformers.logging.set_verbosity(verbosity)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def quieten_libraries() -> None:
    """Hide what LLaVA's libraries log at every load and every answer, unless the root logger logs debug messages."""
    import transformers

    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        transformers.logging.set_verbosity_error()
        for library in _LIBRARIES:
            logging.getLogger(library).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=UserWarning, module="transformers")
