"""Check everything that a comparison needs before its first training: command lines, data, questions, benchmarks."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from llava_steering_plugin.adapters.fit.base_model import read_config
from llava_steering_plugin.checkout.find import find_llava
from llava_steering_plugin.comparison import commands
from llava_steering_plugin.comparison.cells import Cell, Plan
from llava_steering_plugin.comparison.evaluation import score_in
from llava_steering_plugin.comparison.schema import Comparison, Task, Test
from llava_steering_plugin.errors import ArgumentsError, SteeringError, listing, nearest
from llava_steering_plugin.inference.asking.questions import Question, check_questions, read_questions
from llava_steering_plugin.inference.base_files import check_base
from llava_steering_plugin.inference.options import check_bits, choose_device
from llava_steering_plugin.lazy_imports import without_glue_metrics
from llava_steering_plugin.planning.data_check import Checker, check_data, usable_processors
from llava_steering_plugin.pool.pool import BASE
from llava_steering_plugin.training.data.sample_checks import SampleChecks, name_of, style_of
from llava_steering_plugin.training.settings.flags import read_request
from llava_steering_plugin.upstream.install import install
from llava_steering_plugin.upstream.text.conversations import checked_template

CANNOT_START = "this comparison cannot start"
SHOWN = 3  # bad samples of a kind
# Flags of LLaVA that add tokens; the first is on unless it is switched off.
NEW_TOKENS = ("mm_use_im_patch_token", "mm_use_im_start_end")
COUNTS = ("batch_size", "max_new_tokens", "num_beams")


def check(plan: Plan, say: Callable[[str], None]) -> None:
    """Check all cells and tests of a comparison.

    Args:
        say: called with what is being checked.

    Raises:
        ArgumentsError: something would fail; everything that would is named.
    """
    comparison = plan.comparison
    problems = [f"base: {problem}" for problem in _said(lambda: check_base(comparison.base))]
    if not (found := _said(lambda: _import_llava(comparison.program))):
        say("checking the methods' flags")
        problems += _of_methods(plan)
        problems += _of_answers(comparison)
    problems += found
    for task in comparison.tasks:
        say(f"checking the data of {task.name}")
        problems += _of_data(task, plan)
    say("checking questions and annotations")
    problems += _of_tests(comparison)
    if problems:
        raise ArgumentsError(listing(CANNOT_START, list(dict.fromkeys(problems))))


def _import_llava(program: str) -> None:
    find_llava()  # its error says what to do if there is none
    install()
    # Imports of LLaVA print; what they print is not for the output of this program.
    with contextlib.redirect_stdout(sys.stderr), without_glue_metrics():
        import_module("llava.train.train")
        try:
            import_module(program)
        except ImportError as error:
            raise ArgumentsError(f"program: {program} cannot be imported: {error}") from error


def _said(action: Callable[[], Any]) -> list[str]:
    try:
        action()
    except SteeringError as error:
        return [str(error)]
    return []


def _of_methods(plan: Plan) -> list[str]:
    """Return what is wrong with the methods' flags, by the checks that trainings make of their command lines."""
    found = []
    task = plan.comparison.tasks[0]
    for method in dict.fromkeys(cell.method.name for cell in plan.cells):
        cells = [cell for cell in plan.cells if cell.method.name == method and cell.task is task]
        if not cells[0].method.frozen:
            found += [f"methods.{method}: {problem}" for problem in flag_problems(cells[0], plan.comparison)]
    return found


def flag_problems(cell: Cell, comparison: Comparison) -> list[str]:
    """Return why the training of a cell would not start."""
    from llava_steering_plugin.upstream.train.training import flag_classes, problems_of

    classes = flag_classes(import_module("llava.train.train"))
    known = {each.name for kind in classes for each in dataclasses.fields(kind)}
    unknown = [flag for flag in cell.method.flags if flag not in known]
    if unknown:
        return [f"unknown flag {flag}; {nearest(flag, known)}".rstrip("; ") for flag in unknown]
    words = commands.training_flags(cell, comparison, comparison.output)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            request = read_request(classes, words, usage="")
            return problems_of(request) + _lost_tokens(request.flags, comparison.base)
    except SystemExit:
        return [said.getvalue().strip().rpartition("error: ")[2]]
    except SteeringError as error:
        return [str(error)]


def _lost_tokens(flags: Namespace, base: str) -> list[str]:
    """Return the tokens that LLaVA adds to a LoRA's base and does not save: its loader fills their rows with noise."""
    if not getattr(flags, commands.LORA, False):
        return []
    before = read_config(base)
    added = [name for name in NEW_TOKENS if getattr(flags, name, False) and not before.get(name)]
    return [f"LLaVA does not save the tokens that --{name} adds beside a LoRA: give {name}: false" for name in added]


def _of_answers(comparison: Comparison) -> list[str]:
    """Return what is wrong with the options of `llava-steering eval`."""
    given = comparison.answers
    found = [
        f"{name} is {given[name]!r}; give a whole number from 1 on"
        for name in COUNTS
        if name in given and (type(given[name]) is not int or given[name] < 1)
    ]
    bits = {name: given.get(name, False) for name in ("load_4bit", "load_8bit")}
    found += [f"{name} is {value!r}; give true or false" for name, value in bits.items() if type(value) is not bool]
    found += _said(lambda: check_bits(*map(bool, bits.values())))
    found += _said(lambda: choose_device(str(given.get("device", "auto"))))
    if "conv_mode" in given:
        found += _said(lambda: checked_template(str(given["conv_mode"])))
    return [f"answers: {problem}" for problem in found]


def _of_data(task: Task, plan: Plan) -> list[str]:
    """Return the samples that no method could be trained on; a method that skips bad ones does not mind them."""
    methods = [method for method in plan.comparison.methods if not method.frozen]
    strict = [method for method in methods if str(method.flags.get("skip_bad_samples")).lower() != "true"]
    if not strict:
        return []
    flags = strict[0].flags
    checks = SampleChecks(
        str(task.image_folder),
        padded=flags.get("image_aspect_ratio", "square") == "pad",
        style=style_of(str(flags.get("version", "v0"))),
    )
    try:
        report = check_data(str(task.train), Checker(checks, True), keep=SHOWN, processes=usable_processors())
    except SteeringError as error:
        return [f"tasks.{task.name}.train: {error}"]
    place = f"tasks.{task.name}.train: {task.train}"
    found = [f"{place}: {report.file_problem}"] if report.file_problem is not None else []
    if not report.samples and not found:
        found.append(f"{place} has no samples")
    if report.bad:
        first = [f"{name_of(each.index, {'id': each.id})}: {each.reason}" for each in report.problems[:SHOWN]]
        found.append(listing(f"{place} has {report.bad:,} bad samples of {report.samples:,}, such as", first))
    return found


def _of_tests(comparison: Comparison) -> list[str]:
    """Return what is wrong with questions, and with annotations that do not go with them."""
    tests = [
        (f"tasks.{task.name}.{split}.{test.name}", test)
        for task in comparison.tasks
        for split, tests in (("validation", task.validation), ("test", task.test))
        for test in tests
    ]
    with ThreadPoolExecutor(max_workers=max(1, comparison.processes)) as pool:
        return [
            f"{place}: {problem}"
            for (place, _), found in zip(tests, pool.map(_of_test, (test for _, test in tests)), strict=True)
            for problem in found
        ]


def _of_test(test: Test) -> list[str]:
    try:
        questions = read_questions(test.questions)
        if not questions:
            raise ArgumentsError(f"{test.questions} holds no questions")
        check_questions(questions, [BASE], test.image_folder)
    except SteeringError as error:
        return [str(error)]
    return list(_scored_without_answers(test, questions))


def _scored_without_answers(test: Test, questions: list[Question]) -> Iterator[str]:
    """Score answers that say nothing: what is wrong with benchmark, annotations or metric shows before a training."""
    with tempfile.TemporaryDirectory() as folder:
        answers, scores, each = (Path(folder) / name for name in ("answers.jsonl", "scores.json", "each.jsonl"))
        lines = ({"question_id": question.id, "prompt": question.text, "text": ""} for question in questions)
        answers.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        words = [sys.executable, *commands.score(test, answers, scores, each)]
        done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            yield (done.stderr.strip() or done.stdout.strip()).replace(str(answers), str(test.questions))
        elif not each.is_file():
            yield f"benchmark {test.benchmark} gives no score for each question, so methods cannot be compared by it"
        else:
            try:
                score_in(scores, test.metric)
            except SteeringError as error:
                yield str(error).replace(str(scores), test.benchmark)
