"""Check everything that a comparison needs before its first training: base, flags, data, questions, benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from llava_steering_plugin.checkout.find import find_llava
from llava_steering_plugin.comparison import commands
from llava_steering_plugin.comparison.cells import Plan
from llava_steering_plugin.comparison.evaluation import score_in
from llava_steering_plugin.comparison.method_checks import answer_problems, method_problems, said
from llava_steering_plugin.comparison.schema import Comparison, Task, Test
from llava_steering_plugin.errors import ArgumentsError, SteeringError, listing
from llava_steering_plugin.hub import nearest_folder
from llava_steering_plugin.inference.asking.questions import Question, check_questions, read_questions
from llava_steering_plugin.inference.base_files import check_base
from llava_steering_plugin.lazy_imports import without_glue_metrics
from llava_steering_plugin.planning.data_check import Checker, check_data, usable_processors
from llava_steering_plugin.pool.pool import BASE
from llava_steering_plugin.training.data.sample_checks import SampleChecks, name_of, style_of
from llava_steering_plugin.upstream.install import install

CANNOT_START = "this comparison cannot start"
SHOWN = 3  # bad samples of a kind


def check(plan: Plan, say: Callable[[str], None]) -> None:
    """Check all cells and tests of a comparison.

    Args:
        say: called with what is being checked.

    Raises:
        ArgumentsError: something would fail; everything that would is named.
    """
    comparison = plan.comparison
    problems = [f"base: {problem}" for problem in _of_base(comparison)]
    if not (found := said(lambda: _import_llava(comparison.program))):
        say("checking the methods' flags")
        problems += method_problems(plan)
        problems += answer_problems(comparison)
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


def _of_base(comparison: Comparison) -> list[str]:
    found = said(lambda: check_base(comparison.base))
    near = nearest_folder(comparison.base, comparison.folder)
    if found and near is not None and not os.path.exists(comparison.base) and near not in found[0]:
        found.append(f"{comparison.folder} has a folder {near}; is that meant?")
    return found


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
    found: list[str] = []
    asked: dict[str, list[Question]] = {}
    tests = {
        f"tasks.{task.name}.{split}.{test.name}": test
        for task in comparison.tasks
        for split, tests in (("validation", task.validation), ("test", task.test))
        for test in tests
    }
    for place, test in tests.items():
        try:
            asked[place] = _questions(test)
        except SteeringError as error:
            found.append(f"{place}: {error}")
    for task in comparison.tasks:
        found += _in_both(task, {place: (tests[place], asked[place]) for place in asked})
    with ThreadPoolExecutor(max_workers=max(1, comparison.processes)) as pool:
        scored = pool.map(lambda place: list(_scored_without_answers(tests[place], asked[place])), asked)
        return found + [f"{place}: {problem}" for place, own in zip(asked, scored, strict=True) for problem in own]


def _questions(test: Test) -> list[Question]:
    questions = read_questions(test.questions)
    if not questions:
        raise ArgumentsError(f"{test.questions} holds no questions")
    check_questions(questions, [BASE], test.image_folder)
    return questions


def _in_both(task: Task, asked: Mapping[str, tuple[Test, list[Question]]]) -> Iterator[str]:
    """Yield which test questions have chosen the learning rate too: a copy of a file, or a part of one, is no test."""

    def of(split: str) -> Iterator[tuple[str, dict[tuple[str, ...], Any]]]:
        for place, (test, questions) in asked.items():
            if place.startswith(f"tasks.{task.name}.{split}."):
                folder = os.path.realpath(test.image_folder)
                images = ([os.path.realpath(os.path.join(folder, each)) for each in one.images] for one in questions)
                yield place, {(one.text, *own): one.id for one, own in zip(questions, images, strict=True)}

    tested = list(of("test"))
    for place, validated in of("validation"):
        for other, questions in tested:
            if both := [questions[key] for key in questions if key in validated]:
                yield (
                    f"{place} and {other} ask {len(both):,} of the same questions, such as {both[0]!r}: a question "
                    "that has chosen the learning rate is no test; leave them out of one of the two"
                )


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
