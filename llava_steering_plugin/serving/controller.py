"""Runs upstream's controller, unchanged, for requests of its own site only, and with a log of what matters.

    python -m llava_steering_plugin.serving.controller --port 21001

All options are upstream's, except `--allowed-host`. Started by itself, upstream's controller takes any worker that a
web page registers with it, and sends prompts and pictures there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from wrapt import register_post_import_hook, wrap_function_wrapper

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.launch import LaunchRequest, run
from llava_steering_plugin.lazy_imports import defer_compilation
from llava_steering_plugin.serving.proxies import bypass_proxies
from llava_steering_plugin.serving.upstream_program import ALLOWED_HOST, help_parser, import_plainly, taken
from llava_steering_plugin.upstream.startup import flag_value

CONTROLLER = "llava.serve.controller"


def main(words: Sequence[str]) -> None:
    """Run `python -m llava_steering_plugin.serving.controller`."""
    if {"-h", "--help"} & {*words}:
        description = "Run the controller of LLaVA, with its flags and one more."
        help_parser("serve/controller.py", f"{__spec__.name}", description, {}).print_help()
        return
    from llava_steering_plugin.serving.http.access import HostCheck, checked_hosts

    names, upstream_words = taken(words, ALLOWED_HOST)
    allowed = [*checked_hosts(names), flag_value(upstream_words, "--host") or ""]
    defer_compilation()
    bypass_proxies()
    register_post_import_hook(_without_access_log, "uvicorn")
    import_plainly(CONTROLLER).app.add_middleware(HostCheck, allowed=allowed)
    run(LaunchRequest(CONTROLLER, upstream_words))


def _without_access_log(uvicorn: Any) -> None:
    """Keep out of the log what comes several times a second: `serve` and the page ask for the list of models."""

    def quiet(original: Callable[..., Any], instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return original(*args, **{"access_log": False, **kwargs})

    wrap_function_wrapper(uvicorn, "run", quiet)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SteeringError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(1)
