"""Runs upstream's web page, unchanged, without the examples that it lacks and the records that it keeps.

    python -m llava_steering_plugin.serving.page --controller-url http://localhost:21001 --port 7860

All options are upstream's, except `--log-requests`. The differences:

- The wheel lacks the two example pictures, and gradio then refuses to start: missing examples are left out.
- By default the page listens on localhost, and lists the models anew whenever it is loaded. Upstream's default for the
  list (`once`) does not run with the gradio that upstream pins.
- Upstream logs every prompt and answer, keeps them in a file with every vote, and stores every picture. Without
  `--log-requests` the log holds none of this and the files go to a folder that is removed at the end.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from wrapt import register_post_import_hook, wrap_function_wrapper

from llava_steering_plugin.checkout.find import find_llava
from llava_steering_plugin.errors import SteeringError, UpstreamError
from llava_steering_plugin.launch import LaunchRequest, run
from llava_steering_plugin.lazy_imports import defer_compilation
from llava_steering_plugin.serving.proxies import EVERYTHING, bypass_proxies, host_of, is_loopback
from llava_steering_plugin.upstream.startup import flag_value

PAGE = "llava.serve.gradio_web_server"
LOG_REQUESTS = "--log-requests"
# Where the defaults differ from upstream's.
DEFAULTS = {"--model-list-mode": "reload", "--host": "127.0.0.1"}


def main(words: Sequence[str]) -> None:
    """Run `python -m llava_steering_plugin.serving.page`."""
    if {"-h", "--help"} & {*words}:
        help_parser().print_help()
        return
    defer_compilation()
    upstream_words = [word for word in words if word != LOG_REQUESTS]
    for flag, value in DEFAULTS.items():
        if flag_value(upstream_words, flag) is None:
            upstream_words += [flag, value]
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    _keep_calls_direct(upstream_words)
    with ExitStack() as until_the_end:

        def end(number: int, frame: FrameType | None) -> None:
            until_the_end.close()
            os._exit(0)  # at once: gradio's threads would take seconds to end

        signal.signal(signal.SIGTERM, end)
        if LOG_REQUESTS not in words:
            folder = until_the_end.enter_context(tempfile.TemporaryDirectory(prefix="llava-page-"))
            os.environ.setdefault("GRADIO_TEMP_DIR", folder)
            keep_nothing(folder)
        register_post_import_hook(_without_missing_examples, "gradio")
        run(LaunchRequest(PAGE, upstream_words))


def _keep_calls_direct(words: Sequence[str]) -> None:
    """Make the page reach this machine without a proxy: it calls the controller, and itself to see that it is up."""
    controller = flag_value(words, "--controller-url")
    if {"--share", "--moderate"} & {*words} or (controller and not is_loopback(host_of(controller))):
        bypass_proxies(controller or "")
    else:
        os.environ.update(EVERYTHING)  # also what no list of names can say, such as an IPv6 --host


def help_parser() -> argparse.ArgumentParser:
    """Return a parser that knows upstream's flags from the source of the page: importing the page would take seconds.

    It is for `--help` only. The flags are parsed by upstream.

    Raises:
        UpstreamError: there is no LLaVA, or it has no page.
    """
    source = find_llava().package / "serve" / "gradio_web_server.py"
    if not source.is_file():
        raise UpstreamError(f"this LLaVA has no {PAGE}: there is no {source}.")
    parser = argparse.ArgumentParser(
        f"python -m {__spec__.name}", description="Run the web page of LLaVA, with its flags and one more."
    )
    for call in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            flags, settings = [ast.literal_eval(word) for word in call.args], _literals(call.keywords)
            default = DEFAULTS.get(flags[0], settings.get("default"))
            if default not in (None, False) and "help" not in settings:
                settings["help"] = f"default: {default}"
            parser.add_argument(*flags, **settings)
    parser.add_argument(LOG_REQUESTS, action="store_true", help="log prompts and answers, and keep votes and pictures")
    return parser


def _literals(keywords: Sequence[ast.keyword]) -> dict[str, Any]:
    """Return the keyword arguments of a call that are constants; types, which the help does not show, are not."""
    found = {}
    for keyword in keywords:
        with suppress(ValueError):
            found[str(keyword.arg)] = ast.literal_eval(keyword.value)
    return found


def keep_nothing(folder: str) -> None:
    """Make the page write its files to `folder`, and keep prompts and answers out of its log."""
    import llava.constants

    llava.constants.LOGDIR = folder  # before modules of llava.serve read it
    page = importlib.import_module(PAGE)
    page.logger.setLevel(logging.WARNING)


def _without_missing_examples(gradio: Any) -> None:
    def examples(original: Callable[..., Any], instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows = args[0] if args else kwargs.pop("examples")
        there = [row for row in rows if not isinstance(row, list) or Path(str(row[0])).is_file()]
        return original(there, *args[1:], **kwargs) if there else None

    wrap_function_wrapper(gradio, "Examples", examples)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SteeringError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(1)
