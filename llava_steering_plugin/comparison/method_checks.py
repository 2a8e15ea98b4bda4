"""Check the flags of all methods, and the options of `llava-steering eval`, before the first training."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import multiprocessing
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from typing import Any

from llava_steering_plugin.adapters.fit.base_model import read_config
from llava_steering_plugin.comparison import commands
from llava_steering_plugin.comparison.cells import Cell, Plan
from llava_steering_plugin.comparison.schema import Comparison
from llava_steering_plugin.errors import SteeringError, nearest
from llava_steering_plugin.inference.options import check_bits, choose_device
from llava_steering_plugin.training.settings.flags import read_request
from llava_steering_plugin.upstream.text.conversations import checked_template

# Flags of LLaVA that add tokens; the first is on unless it is switched off.
NEW_TOKENS = ("mm_use_im_patch_token", "mm_use_im_start_end")
COUNTS = ("batch_size", "max_new_tokens", "num_beams")
LLAVAS_TRAINING = "llava.train.train"
_WRONG_VALUE = re.compile(r"error: (argument --(\w+).*)", re.DOTALL)


def said(action: Callable[[], Any]) -> list[str]:
    """Return the message of the error that an action raises, if any."""
    try:
        action()
    except SteeringError as error:
        return [str(error)]
    return []


def method_problems(plan: Plan) -> list[str]:
    """Return what is wrong with the methods' flags, by the checks that trainings make of their command lines.

    What several methods share is said once.
    """
    first: dict[str, Cell] = {}
    for cell in plan.cells:
        if not cell.method.frozen:
            first.setdefault(cell.method.name, cell)
    of: dict[str, list[str]] = {}
    refused = _refused_values(first, plan.comparison)
    for name, cell in first.items():
        for problem in [*flag_problems(cell, plan.comparison), *refused.get(name, ())]:
            of.setdefault(problem, []).append(name)
    return [f"methods.{', '.join(dict.fromkeys(names))}: {problem}" for problem, names in of.items()]


def flag_problems(cell: Cell, comparison: Comparison) -> list[str]:
    """Return why the training of a cell would not start, as far as its flags tell without making anything of them."""
    from llava_steering_plugin.upstream.train.training import flag_classes, problems_of

    classes = flag_classes(import_module(LLAVAS_TRAINING))
    known = {each.name for kind in classes for each in dataclasses.fields(kind)}
    unknown = [flag for flag in cell.method.flags if flag not in known]
    found = [f"unknown flag {flag}; {nearest(flag, known)}".rstrip("; ") for flag in unknown]
    left_out = set(unknown)
    while True:
        words = commands.training_flags(_without(cell, left_out), comparison, comparison.output)
        printed = io.StringIO()
        try:
            with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
                request = read_request(classes, words, usage="")
                of_request = problems_of(request)
            return [*found, *of_request, *_lost_tokens(request.flags, comparison.base)]
        except SystemExit:  # argparse stops at the first value that it cannot read
            wrong = _WRONG_VALUE.search(printed.getvalue().strip())
            found.append(wrong[1] if wrong else printed.getvalue().strip())
            if wrong is None or wrong[2] not in cell.method.flags or wrong[2] in left_out:
                return found
            left_out.add(wrong[2])
        except SteeringError as error:
            return [*found, str(error)]


def _without(cell: Cell, flags: Iterable[str]) -> Cell:
    left = {flag: value for flag, value in cell.method.flags.items() if flag not in flags}
    return dataclasses.replace(cell, method=dataclasses.replace(cell.method, flags=left))


def _refused_values(cells: Mapping[str, Cell], comparison: Comparison) -> dict[str, list[str]]:
    """Return what transformers says against the values of each method when it makes its arguments of them.

    It looks for GPUs then, which would stay in use by this process: so another one does it, which begins as a copy of
    this one and has imported everything.
    """
    words = {
        # A file of DeepSpeed's would start its ranks. The flag is checked by `conflicts`.
        name: commands.training_flags(_without(cell, ["deepspeed"]), comparison, comparison.output)
        for name, cell in cells.items()
    }
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as other:
        return dict(zip(words, other.map(_refused, words.values()), strict=True))


def _refused(words: list[str]) -> list[str]:
    from transformers import HfArgumentParser

    from llava_steering_plugin.upstream.train.training import flag_classes

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            classes = flag_classes(import_module(LLAVAS_TRAINING))
            HfArgumentParser(classes).parse_args_into_dataclasses(words, return_remaining_strings=True)
    except SystemExit:  # a value that argparse cannot read, of which `flag_problems` tells
        return []
    except (SteeringError, ValueError, ImportError, OSError) as error:
        cause = error.__cause__ if isinstance(error, SteeringError) and error.__cause__ is not None else error
        return [" ".join(str(cause).split())]
    return []


def _lost_tokens(flags: Namespace, base: str) -> list[str]:
    """Return the tokens that LLaVA adds to a LoRA's base and does not save: its loader fills their rows with noise."""
    if not getattr(flags, commands.LORA, False):
        return []
    try:
        before = read_config(base)
    except SteeringError:
        return []  # the check of the base says why
    added = [name for name in NEW_TOKENS if getattr(flags, name, False) and not before.get(name)]
    return [f"LLaVA does not save the tokens that --{name} adds beside a LoRA: give {name}: false" for name in added]


def answer_problems(comparison: Comparison) -> list[str]:
    """Return what is wrong with the options of `llava-steering eval`."""
    given = comparison.answers
    found = [
        f"{name} is {given[name]!r}; give a whole number from 1 on"
        for name in COUNTS
        if name in given and (type(given[name]) is not int or given[name] < 1)
    ]
    bits = {name: given.get(name, False) for name in ("load_4bit", "load_8bit")}
    found += [f"{name} is {value!r}; give true or false" for name, value in bits.items() if type(value) is not bool]
    device = str(given.get("device", "auto"))
    found += said(lambda: check_bits(bits["load_4bit"] is True, bits["load_8bit"] is True, device))
    if device != "cpu":  # for the CPU it hides all GPUs, which the trainings may use
        found += said(lambda: choose_device(device))
    if "conv_mode" in given:
        found += said(lambda: checked_template(str(given["conv_mode"])))
    return [f"answers: {problem}" for problem in found]
