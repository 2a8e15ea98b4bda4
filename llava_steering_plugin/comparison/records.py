"""Read and write results.jsonl, the results of a comparison: one line for each evaluation of a cell that has ended."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from llava_steering_plugin.errors import ArgumentsError, listing, shortened
from llava_steering_plugin.whole_files import write_whole

FILE = "results.jsonl"
VALIDATION, TEST = "validation", "test"
SPLITS = (VALIDATION, TEST)
# What became of a cell: `diverged` is a training whose loss became NaN or infinite.
DONE, FAILED, DIVERGED = "done", "failed", "diverged"
STATUSES = (DONE, FAILED, DIVERGED)


@dataclass(frozen=True)
class Score:
    """Holds what a cell has reached in one test.

    Attributes:
        benchmark: whose official rule has scored the answers.
        score: the first number of that rule, as `llava-steering score` gives it.
        questions: how many were scored.
        answers, per_question: files, relative to the output folder: LLaVA's answers, and lines of
            {"question_id": ..., "score": 0 to 1}.
    """

    benchmark: str
    score: float
    questions: int
    answers: str
    per_question: str


@dataclass(frozen=True)
class Record:
    """Holds one evaluation of a cell on one split: a line of results.jsonl.

    Attributes:
        cell: the id of the training, the same on both splits.
        task, method: their names in the YAML.
        settings: the flags of the training, without those that say where files are.
        learning_rate, seed: the base itself, which is not trained, has 0.0 and the first seed.
        split: VALIDATION, or TEST, which only the chosen learning rate's cells have.
        status: DONE, FAILED or DIVERGED; all numbers of the latter two are those known before they ended.
        error: why it is not done.
        adapter: the folder that the training has written, relative to the output folder; "" for the base.
        trained_parameters: the mode's, LoRA's or PEFT's own, without the projector's.
        projector_parameters: of the projector, if it is trained; else 0.
        file_bytes: of what is loaded beside the base.
        train_losses: [step, loss] as logged; the loss is None where it is no finite number.
        eval_loss: the last one of --validation_data_path; None without that.
        scores: by the name of the test.
        step_seconds: the median time of a training step after the first ones; 0.0 for the base.
        step_ratio: the same over the time of a forward pass of the frozen model on this machine, in this run.
        answer_seconds: for a question, without loading.
        answer_ratio: the same over the frozen model's.
        peak_bytes: the largest memory of the training: of the GPU, or without one of the process.
        versions: of the packages, by name.
        git: `commit` and `dirty` of the package's checkout; empty where there is none.
        started, ended: ISO 8601, in UTC.
    """

    cell: str
    task: str
    method: str
    settings: dict[str, Any]
    learning_rate: float
    seed: int
    split: str
    status: str
    error: str | None = None
    adapter: str = ""
    trained_parameters: int = 0
    projector_parameters: int = 0
    file_bytes: int = 0
    train_losses: list[Any] = field(default_factory=list)
    eval_loss: float | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    step_seconds: float = 0.0
    step_ratio: float = 0.0
    answer_seconds: float = 0.0
    answer_ratio: float = 0.0
    peak_bytes: int = 0
    versions: dict[str, Any] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)
    started: str = ""
    ended: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the record as plain values; numbers that are not finite become None."""
        return dict(_finite(dataclasses.asdict(self)))


def read_records(file: Path) -> list[Record]:
    """Read results.jsonl.

    Raises:
        ArgumentsError: it is not there, cannot be read, or lines are no records; all of them are named.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ArgumentsError(f"{file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ArgumentsError(f"{file} is no text in UTF-8, so no results of `compare`.") from error
    records, problems = [], []
    for number, line in enumerate(lines, 1):
        try:
            records.append(record_from(json.loads(line)))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise ArgumentsError(listing(f"{file} holds no results of `compare`", shortened(problems)))
    return records


def write_records(file: Path, records: Iterable[Record]) -> None:
    """Write results.jsonl, whole or not at all.

    Raises:
        OSError: it cannot be written; what was there before is unharmed.
    """
    write_whole(file, "".join(json.dumps(record.as_json(), allow_nan=False) + "\n" for record in records))


def record_from(data: Any) -> Record:
    """Return a record from the plain values of its line. Keys that are unknown are of later versions, and left out.

    Raises:
        ValueError: it is none; the message names all that is wrong.
    """
    values, problems = _fields(Record, data, "")
    if not problems:
        for name, known in (("split", SPLITS), ("status", STATUSES)):
            if values[name] not in known:
                problems.append(f"{name} is {values[name]!r}, not one of {', '.join(known)}")
        scores = {}
        for test, score in values.get("scores", {}).items():
            own, wrong = _fields(Score, score, f"scores.{test}.")
            problems += wrong
            scores[test] = Score(**own) if not wrong else score
        values["scores"] = scores
    if problems:
        raise ValueError("; ".join(problems))
    return Record(**values)


def _fields(kind: type, data: Any, place: str) -> tuple[dict[str, Any], list[str]]:
    """Return the values of a dataclass's fields that `data` holds, and what is wrong with them."""
    if not isinstance(data, Mapping):
        return {}, [f"{place.rstrip('.') or 'it'} is no object"]
    hints, values, problems = get_type_hints(kind), {}, []
    for each in dataclasses.fields(kind):
        if each.name in data:
            values[each.name] = value = data[each.name]
            if not _is(value, hints[each.name]):
                problems.append(f"{place}{each.name} is {value!r:.60}")
        elif each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            problems.append(f"{place}{each.name} is missing")
    return values, problems


def _is(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_is(value, each) for each in get_args(hint))
    kind = get_origin(hint) or hint
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
