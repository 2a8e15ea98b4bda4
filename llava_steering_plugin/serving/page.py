"""Upstream's web page, unchanged, without what it lacks and without what it keeps.

    python -m llava_steering_plugin.serving.page --controller-url http://localhost:21001 --port 7860

All flags are upstream's, but for `--log-requests`. What is different:

- The wheel comes without the two example pictures, and gradio then refuses to start: examples that are missing are left
  out.
- The page listens on localhost, and lists models anew whenever it is loaded, unless told otherwise. Upstream's default
  for the second (`once`) does not run with the gradio that upstream pins.
- Upstream logs every prompt and answer, keeps them in a file beside every vote, and stores every picture. Without
  `--log-requests` the log has none of it and the files go to a folder that is removed at the end.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from wrapt import register_post_import_hook, wrap_function_wrapper

from llava_steering_plugin.launch import Request, run
from llava_steering_plugin.upstream.startup import flag_value

PAGE = "llava.serve.gradio_web_server"
LOG_REQUESTS = "--log-requests"


def main(words: Sequence[str]) -> None:
    """Entry of `python -m llava_steering_plugin.serving.page`."""
    upstreams = [word for word in words if word != LOG_REQUESTS]
    for flag, value in (("--model-list-mode", "reload"), ("--host", "127.0.0.1")):
        if flag_value(upstreams, flag) is None:
            upstreams += [flag, value]
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    with ExitStack() as until_the_end:

        def end(number: int, frame: FrameType | None) -> None:
            until_the_end.close()
            os._exit(0)  # at once: gradio's threads would take seconds to end, and hold nothing

        signal.signal(signal.SIGTERM, end)
        if LOG_REQUESTS not in words:
            folder = until_the_end.enter_context(tempfile.TemporaryDirectory(prefix="llava-page-"))
            os.environ.setdefault("GRADIO_TEMP_DIR", folder)
            keep_nothing(folder)
        register_post_import_hook(_without_missing_examples, "gradio")
        run(Request(PAGE, upstreams))


def keep_nothing(folder: str) -> None:
    """Sends upstream's files to `folder`, and keeps prompts and answers out of the log."""
    import llava.constants

    llava.constants.LOGDIR = folder  # before anything of llava.serve takes it from there
    page = importlib.import_module(PAGE)
    page.logger.setLevel(logging.WARNING)


def _without_missing_examples(gradio: Any) -> None:
    def examples(original: Callable[..., Any], instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows = args[0] if args else kwargs.pop("examples")
        there = [row for row in rows if not isinstance(row, list) or Path(str(row[0])).is_file()]
        return original(there, *args[1:], **kwargs) if there else None

    wrap_function_wrapper(gradio, "Examples", examples)


if __name__ == "__main__":
    main(sys.argv[1:])
