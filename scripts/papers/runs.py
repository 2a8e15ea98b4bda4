"""Run one benchmark on all models: prepare, eval, score. A finished one is used again, a stopped one goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.evaluation.layouts.registry import layout_of
from llava_steering_plugin.evaluation.preparing import IMAGES, Prepared, prepare
from llava_steering_plugin.evaluation.scoring import score, write_json
from llava_steering_plugin.inference.asking.answers_file import contents_of
from llava_steering_plugin.pool.pool import BASE
from llava_steering_plugin.whole_files import write_whole
from papers.tables import ENTRIES


@dataclass(frozen=True)
class Request:
    """Holds what is asked of a run; all of it has been checked.

    Attributes:
        base: the base model.
        adapters: their places, by name. With the base, they are the models.
        data: the folder with one folder for each benchmark.
        output: the folder of everything that is written.
        samples, seed: how many questions of each benchmark are drawn; None: all.
        options: of `llava-steering eval`, the same for all benchmarks.
    """

    base: str
    adapters: Mapping[str, str]
    data: Path
    output: Path
    samples: int | None
    seed: int
    options: Mapping[str, str]

    @property
    def models(self) -> tuple[str, ...]:
        return (BASE, *self.adapters)


class RunError(SteeringError):
    """A step of a benchmark has failed; the others go on."""


def source_of(request: Request, task: str) -> Path | None:
    """Return the folder of a benchmark's data; None: it is not there."""
    names = ENTRIES[task].folders or (task,)
    return next((request.data / name for name in names if (request.data / name).is_dir()), None)


def results_file(request: Request, task: str) -> Path:
    return request.output / "results" / f"{task}.json"


def questions_file(request: Request, task: str) -> Path:
    """Return the file with the questions of a benchmark, once for each model."""
    return request.output / "questions" / f"{task}.jsonl"


def answers_file(request: Request, task: str, model: str | None = None) -> Path:
    """Return the file with the answers of one model, or of all. No benchmark has a dash in its name."""
    return request.output / "answers" / (f"{task}.jsonl" if model is None else f"{task}-{model}.jsonl")


def finished(request: Request, task: str) -> dict[str, Any] | None:
    """Return the scores by model, if they are of this very request."""
    try:
        found = json.loads(results_file(request, task).read_text())
    except (OSError, ValueError):
        return None
    same = isinstance(found, dict) and found.get("key") == _key(request, task)
    return dict(found["scores"]) if same else None


def _key(request: Request, task: str) -> dict[str, Any]:
    """Return all that the scores of a benchmark depend on."""
    entry, source = ENTRIES[task], source_of(request, task)
    return {
        "base": [request.base, _contents(request.base)],
        "adapters": {name: [place, _contents(place)] for name, place in request.adapters.items()},
        "source": str(source),
        "split": entry.split,
        "samples": request.samples,
        "seed": request.seed,
        "tokens": entry.tokens,
        "options": dict(request.options),
    }


def _contents(place: str) -> Any:
    """Return what changes with a model's files: their sizes and times, as hashing each of them would take long."""
    return contents_of(os.path.expanduser(place), hashed=False)


def eval_command(request: Request, task: str) -> list[str]:
    """Return the command that answers the questions of a benchmark, each with the model that its line names."""
    adapters = [word for name, place in request.adapters.items() for word in ("--adapter", f"{name}={place}")]
    flags = {
        "question-file": questions_file(request, task),
        "image-folder": request.output / "data" / IMAGES,
        "answers-file": answers_file(request, task),
        "max-new-tokens": ENTRIES[task].tokens,
        **request.options,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", *([str(value)] if value != "" else []))]
    return [sys.executable, "-m", "llava_steering_plugin", "eval", request.base, *adapters, *words]


def run_task(request: Request, task: str) -> dict[str, Any]:
    """Return the scores by model; run what is missing.

    Raises:
        SteeringError: a step has failed. What it has written stays, and the next run goes on from there.
    """
    done = finished(request, task)
    if done is not None:
        return done
    # What it depends on is noted first: a model that changes meanwhile is evaluated again.
    started, key, source = time.monotonic(), _key(request, task), source_of(request, task)
    assert source is not None
    entry = ENTRIES[task]
    layout, split = layout_of(task, entry.split)
    whole = sum(1 for _ in layout.read(source, split)) if request.samples else 0
    fewer = request.samples if request.samples is not None and request.samples < whole else None
    made = prepare(task, source, request.output / "data", split=split, samples=fewer, seed=request.seed)
    answers = answers_file(request, task)
    _ask_all(request, made, questions_file(request, task))
    status = subprocess.run(eval_command(request, task), check=False).returncode
    if status:
        raise RunError(f"`llava-steering eval` ended with {status}; what it has answered stays in {answers}.")
    lines = answers.read_text().splitlines(keepends=True)
    scores = {}
    for place, model in enumerate(request.models):
        own = answers_file(request, task, model)
        write_whole(own, "".join(lines[place * made.entries : (place + 1) * made.entries]))
        submission = own.with_name(f"{own.stem}-submission.json") if entry.metric is None else None
        found = score(task, own, source, allow_missing=fewer is not None, submission=submission is not None)
        scores[model] = found.as_json()
        if submission is not None:
            write_json(submission, found.submission)
            scores[model]["submission"] = str(submission)
    seconds = round(time.monotonic() - started, 1)
    results_file(request, task).parent.mkdir(parents=True, exist_ok=True)
    write_json(results_file(request, task), {"key": key, "seconds": seconds, "scores": scores})
    return scores


def _ask_all(request: Request, made: Prepared, file: Path) -> None:
    """Write the questions once for each model, in the order of the models."""
    lines = [json.loads(line) for line in made.questions.read_text().splitlines()]
    text = "".join(json.dumps({**line, "adapter": model}) + "\n" for model in request.models for line in lines)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, text)
