"""Answer the tests of a split with a trained cell, score the answers, and make the record of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_steering_plugin.comparison import commands
from llava_steering_plugin.comparison.cells import Cell, Plan, readable, tests_of
from llava_steering_plugin.comparison.logs import end_of
from llava_steering_plugin.comparison.processes import Command
from llava_steering_plugin.comparison.provenance import Provenance, now
from llava_steering_plugin.comparison.records import DIVERGED, DONE, FAILED, Record, Score, record_from
from llava_steering_plugin.comparison.schema import Test
from llava_steering_plugin.comparison.training import Trained, train
from llava_steering_plugin.errors import DataError
from llava_steering_plugin.whole_files import write_whole

RECORD = "record.json"


@dataclass(frozen=True)
class Files:
    """The files of one test of a cell."""

    answers: Path
    timing: Path
    scores: Path
    per_question: Path
    log: Path

    def are_answered(self) -> bool:
        """Return whether `llava-steering eval` has come to its end: it writes the times last."""
        return self.answers.is_file() and self.timing.is_file()


def folder_of(cell: Cell, plan: Plan, split: str, output: Path) -> Path:
    """Return the folder of an evaluation; other tests of the same split have another one."""
    return cell.folder(output) / f"{split}-{plan.marks[cell.task.name, split]}"


def files_of(cell: Cell, plan: Plan, split: str, test: Test, output: Path) -> Files:
    """Return where the files of a test are."""
    place = tests_of(cell.task, split).index(test)
    stem = folder_of(cell, plan, split, output) / f"{place}-{readable(test.name)}"
    return Files(
        *(stem.with_name(f"{stem.name}.{end}") for end in ("answers.jsonl", "timing.json", "scores.json")),
        *(stem.with_name(f"{stem.name}.{end}") for end in ("per-question.jsonl", "log")),
    )


def find_record(cell: Cell, plan: Plan, split: str, output: Path) -> Record | None:
    """Return the record of an evaluation that has ended; None if it has to run."""
    try:
        record = record_from(json.loads((folder_of(cell, plan, split, output) / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
    # What failed for reasons that may be gone by now is tried again.
    return record if record.status != FAILED and record.cell == cell.id else None


def evaluate(
    cell: Cell, plan: Plan, split: str, output: Path, provenance: Provenance, env: Mapping[str, str]
) -> Generator[Command, int, Record]:
    """Yield the commands that train a cell, answer and score; those whose results are there are left out.

    Raises:
        OSError: the folder of the cell cannot be written.
    """
    comparison, started = plan.comparison, now()
    trained = Trained(DONE)
    if not cell.method.frozen:
        trained = yield from train(cell, comparison, output, env)
    record = _record(cell, split, trained, output, provenance, started)
    folder = folder_of(cell, plan, split, output)
    folder.mkdir(parents=True, exist_ok=True)
    if trained.status == DONE:
        times: list[Any] = []
        for test in tests_of(cell.task, split):
            files = files_of(cell, plan, split, test, output)
            problem = yield from _answer_and_score(cell, plan, test, files, output, env)
            if problem is not None:
                record = replace(record, status=problem[0], error=problem[1])
                break
            record.scores[test.name] = _score(test, files, output)
            times.append(json.loads(files.timing.read_text(encoding="utf-8")))
        if times:
            record = replace(
                record,
                answer_seconds=statistics.mean(each["seconds"] for each in times),
                answer_ratio=statistics.mean(each["ratio"] for each in times),
            )
    record = replace(record, ended=now())
    write_whole(folder / RECORD, json.dumps(record.as_json()) + "\n")
    return record


def _answer_and_score(
    cell: Cell, plan: Plan, test: Test, files: Files, output: Path, env: Mapping[str, str]
) -> Generator[Command, int, tuple[str, str] | None]:
    """Yield what makes the files of a test; return the status and why, if they cannot be made."""
    if not files.are_answered():
        words = commands.answer(cell, plan.comparison, test, files.answers, files.timing, output)
        status = yield Command(commands.launched(words, ()), files.log, env)
        if failed := _without_answer(files.answers):
            return (
                DIVERGED,
                f"{failed} answers of {test.name} are none: the logits became NaN or infinite ({files.log})",
            )
        if status:
            return FAILED, end_of(files.log, status, f"`eval` of {test.name}")
    if not (files.scores.is_file() and files.per_question.is_file()):
        words = commands.score(test, files.answers, files.scores, files.per_question)
        status = yield Command(commands.launched(words, ()), files.log, env)
        if status:
            return FAILED, end_of(files.log, status, f"`score` of {test.name}")
    try:
        score_in(files.scores, test.metric)
    except DataError as error:
        return FAILED, str(error)
    return None


def _without_answer(answers: Path) -> int:
    """Return how many questions have no answer in a file, because of the model."""
    try:
        lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").split("\n") if line]
        return sum("error" in (line.get("metadata") or {}) for line in lines)
    except (OSError, ValueError):
        return 0


def score_in(scores: Path, metric: str | None) -> tuple[float, int]:
    """Return the score in a file of `llava-steering score`, and the number of questions.

    Args:
        metric: GROUP.NAME; None: the one that is the mean over the questions.

    Raises:
        DataError: there is no such number.
    """
    found = json.loads(scores.read_text(encoding="utf-8"))
    metrics: Mapping[str, Mapping[str, Any]] = found.get("metrics") or {}
    per_question = found.get("per_question") or {}
    questions = int(per_question.get("questions") or found["answers"])
    if metric is None:
        value = per_question.get("mean")
    else:
        group, _, name = metric.rpartition(".")
        value = metrics.get(group or "all", {}).get(name)
    if not isinstance(value, int | float):
        known = ", ".join(f"{group}.{name}" for group, values in metrics.items() for name in values) or "none"
        raise DataError(f"{scores} has no number {metric or 'for each question'}; `metric` takes one of: {known}")
    return float(value), questions


def _score(test: Test, files: Files, output: Path) -> Score:
    value, questions = score_in(files.scores, test.metric)
    answers, per_question = (str(file.relative_to(output)) for file in (files.answers, files.per_question))
    return Score(test.benchmark, value, questions, answers, per_question)


def _record(cell: Cell, split: str, trained: Trained, output: Path, provenance: Provenance, started: str) -> Record:
    measured = trained.measured
    step, frozen = (float(measured.get(name) or 0.0) for name in ("step_seconds", "frozen_seconds"))
    return Record(
        cell=cell.id,
        task=cell.task.name,
        method=cell.method.name,
        settings=dict(cell.method.flags),
        learning_rate=cell.rate,
        seed=cell.seed,
        split=split,
        status=trained.status,
        error=trained.error,
        adapter="" if cell.method.frozen else str((cell.folder(output) / commands.MODEL).relative_to(output)),
        trained_parameters=int(measured.get("trained_parameters") or 0),
        projector_parameters=int(measured.get("projector_parameters") or 0),
        file_bytes=trained.file_bytes,
        train_losses=trained.losses,
        eval_loss=measured.get("eval_loss"),
        step_seconds=step,
        step_ratio=step / frozen if frozen else 0.0,
        peak_bytes=int(measured.get("peak_bytes") or 0),
        versions=dict(provenance.versions),
        git=dict(provenance.git),
        started=started,
    )
