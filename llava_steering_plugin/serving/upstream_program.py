"""Helps to run upstream's servers: with flags of ours beside upstream's, a help with both, and a plain log."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any

from llava_steering_plugin.checkout.find import find_llava
from llava_steering_plugin.errors import UpstreamError

ALLOWED_HOST = "--allowed-host"
ALLOWED_HOST_HELP = "name or address in the browser's address bar that is allowed besides localhost; may be repeated"


def taken(words: Sequence[str], flag: str) -> tuple[list[str], list[str]]:
    """Return the values of a flag of ours, which may be repeated, and the words without it."""
    values: list[str] = []
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if word == flag:
            values.append(left.pop(0) if left else "")
        elif word.startswith(f"{flag}="):
            values.append(word.partition("=")[2])
        else:
            rest.append(word)
    return values, rest


def help_parser(file: str, program: str, description: str, defaults: Mapping[str, str]) -> argparse.ArgumentParser:
    """Return a parser that knows the flags of one of upstream's programs from its source: an import takes seconds.

    It is for `--help` only. The flags are parsed by upstream.

    Args:
        file: upstream's program, below its package.
        program: the name of our module.
        defaults: where they differ from upstream's, by flag.

    Raises:
        UpstreamError: there is no LLaVA, or it lacks the program.
    """
    source = find_llava().package / file
    if not source.is_file():
        raise UpstreamError(f"this LLaVA has no such program: there is no {source}.")
    parser = argparse.ArgumentParser(f"python -m {program}", description=description)
    for call in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            flags, settings = [ast.literal_eval(word) for word in call.args], _literals(call.keywords)
            default = defaults.get(flags[0], settings.get("default"))
            if default not in (None, False) and "help" not in settings:
                settings["help"] = f"default: {default}"
            parser.add_argument(*flags, **settings)
    parser.add_argument(ALLOWED_HOST, metavar="NAME", action="append", help=ALLOWED_HOST_HELP)
    return parser


def import_plainly(module: str) -> ModuleType:
    """Import one of upstream's servers; leave standard output and error as they are.

    Upstream makes log records of all that is written there, and errors of standard error, where uvicorn says that all
    is well.
    """
    with contextlib.redirect_stdout(sys.stdout), contextlib.redirect_stderr(sys.stderr):
        return importlib.import_module(module)


def _literals(keywords: Sequence[ast.keyword]) -> dict[str, Any]:
    """Return the keyword arguments of a call that are constants; types, which the help does not show, are not."""
    found = {}
    for keyword in keywords:
        with suppress(ValueError):
            found[str(keyword.arg)] = ast.literal_eval(keyword.value)
    return found
