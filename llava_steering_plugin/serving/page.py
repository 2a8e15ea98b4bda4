"""Runs upstream's web page, unchanged, without the examples that it lacks and the records that it keeps.

    python -m llava_steering_plugin.serving.page --controller-url http://localhost:21001 --port 7860

All options are upstream's, except `--log-requests` and `--allowed-host`. The differences:

- The wheel lacks the two example pictures, and gradio then refuses to start: missing examples are left out.
- By default the page listens on localhost, and lists the models anew whenever it is loaded. Upstream's default for the
  list (`once`) does not run with the gradio that upstream pins.
- Upstream logs every prompt and answer, keeps them in a file with every vote, and stores every picture. Without
  `--log-requests` the log holds none of this and the files go to a folder that is removed at the end.
- A model whose name begins with a template and a colon is asked in that template (`inference/sources.py`).
- Requests of other sites are refused (`http/access.py`), unless `--share` is given.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from wrapt import register_post_import_hook, wrap_function_wrapper

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.inference.sources import component_templates
from llava_steering_plugin.launch import LaunchRequest, run
from llava_steering_plugin.lazy_imports import defer_compilation
from llava_steering_plugin.serving import upstream_program
from llava_steering_plugin.serving.proxies import EVERYTHING, bypass_proxies, host_of, is_loopback
from llava_steering_plugin.serving.upstream_program import ALLOWED_HOST, import_plainly, taken
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
    from llava_steering_plugin.serving.http.access import checked_hosts

    names, upstream_words = taken([word for word in words if word != LOG_REQUESTS], ALLOWED_HOST)
    allowed = checked_hosts(names)
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
            keep_files_in(folder)
        register_post_import_hook(_without_missing_examples, "gradio")
        if "--share" not in upstream_words:  # gradio then gives it a name, and others' pages get one there too
            host = flag_value(upstream_words, "--host") or ""
            register_post_import_hook(partial(_for_own_site, allowed=[*allowed, host]), "gradio.routes")
        page = import_plainly(PAGE)
        pick_templates(page)
        if LOG_REQUESTS not in words:
            page.logger.setLevel(logging.WARNING)
        run(LaunchRequest(PAGE, upstream_words))


def _keep_calls_direct(words: Sequence[str]) -> None:
    """Make the page reach this machine without a proxy: it calls the controller, and itself to see that it is up."""
    controller = flag_value(words, "--controller-url")
    if {"--share", "--moderate"} & {*words} or (controller and not is_loopback(host_of(controller))):
        bypass_proxies(controller or "")
    else:
        os.environ.update(EVERYTHING)  # also what no list of names can say, such as an IPv6 --host


def help_parser() -> argparse.ArgumentParser:
    """Return a parser with all flags of the page, for `--help`.

    Raises:
        UpstreamError: there is no LLaVA, or it has no page.
    """
    description = "Run the web page of LLaVA, with its flags and two more."
    parser = upstream_program.help_parser("serve/gradio_web_server.py", f"{__spec__.name}", description, DEFAULTS)
    parser.add_argument(LOG_REQUESTS, action="store_true", help="log prompts and answers, and keep votes and pictures")
    return parser


def keep_files_in(folder: str) -> None:
    """Make the page write its files to `folder`. Call it before the page is imported."""
    import llava.constants

    llava.constants.LOGDIR = folder


def pick_templates(page: Any) -> None:
    """Have the page begin a conversation in the template that stands before the colon in a model's name, if one does.

    LLaVA's page picks from its own templates, by parts of the name.

    Args:
        page: `llava.serve.gradio_web_server`.
    """
    named = threading.local()  # gradio gives each request, and each step of it, some thread

    class Templates(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            return super().__getitem__(getattr(named, "template", None) or key)

    def http_bot(original: Callable[..., Any], instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        steps = original(*args, **kwargs)
        model = args[1] if len(args) > 1 else kwargs["model_selector"]
        template = str(model).rpartition(":")[0]
        while True:
            named.template = template if template in component_templates() else None
            try:
                step = next(steps, None)
            finally:
                named.template = None
            if step is None:
                return
            yield step

    page.conv_templates = Templates(page.conv_templates)
    wrap_function_wrapper(page, "http_bot", http_bot)


def _for_own_site(routes: Any, allowed: Sequence[str]) -> None:
    """Have gradio's applications refuse requests of other sites, in front of what lets all sites in."""
    from llava_steering_plugin.serving.http.access import HostCheck

    def guarded(original: Callable[..., Any], instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        app = original(*args, **kwargs)
        app.add_middleware(HostCheck, allowed=allowed)
        return app

    wrap_function_wrapper(routes, "App.create_app", guarded)


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
