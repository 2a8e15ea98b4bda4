"""Measure modality attention of several models one after another, and write measurements, tables and pictures."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_steering_plugin.diagnostics.modality.one_model import Chosen, measure_questions
from llava_steering_plugin.diagnostics.modality.summary import modality_rows, notes_on, summarise_model
from llava_steering_plugin.diagnostics.pictures.heat_maps import draw_heads
from llava_steering_plugin.diagnostics.pictures.plots import draw_modality
from llava_steering_plugin.diagnostics.records import Records, open_records
from llava_steering_plugin.diagnostics.results import Progress, write_tables
from llava_steering_plugin.errors import ArgumentsError, listing, shortened
from llava_steering_plugin.inference.asking.answering import AnswerOptions, BatchAnswers
from llava_steering_plugin.inference.asking.questions import Question
from llava_steering_plugin.inference.models import open_model


@dataclass(frozen=True)
class ModalityRequest:
    """Holds what is asked of one run.

    Attributes:
        models: the path of each model, by the name that pictures and tables give it.
        chosen: the questions.
        given: the answers to measure, by question id; None: each model's own.
        images: the folder of the images.
        settings: what measurements depend on besides the model.
        options: how the models answer.
        base: where the base of adapters is, if it has moved.
        how: `device`, `load_4bit`, `load_8bit`.
        output: the folder of everything that is written.
        per_head: whether tables and a picture also show single heads.
    """

    models: Mapping[str, str]
    chosen: Chosen
    given: Mapping[Any, str] | None
    images: Path
    settings: Mapping[str, Any]
    options: AnswerOptions
    base: str | None
    how: Mapping[str, Any]
    output: Path
    per_head: bool = False


def run_modality(request: ModalityRequest, progress: Progress) -> tuple[list[Path], list[str]]:
    """Measure all models, and return the files of the result, and notes on questions that were left out.

    Raises:
        SteeringError: a model cannot be loaded or measured; what was measured before is kept.
    """
    kept = open_records(request.output / "modality", request.settings, request.models, request.base)
    summaries = []
    for name, path in request.models.items():
        about = _measure(request, name, path, kept[name], progress)
        gc.collect()  # model and pool refer to each other, and the next model needs the memory
        text_only = request.chosen.text_only
        summaries.append(summarise_model(name, about, kept[name], text_only, per_head=request.per_head))
    return _write(summaries, request), notes_on(summaries)


def read_answers(file: Path, questions: Sequence[Question]) -> dict[Any, str]:
    """Read the answers to some questions from LLaVA's answer file.

    Raises:
        ArgumentsError: the file cannot be read, or lacks answers; the message lists what is wrong.
    """
    answers: dict[Any, str] = {}
    problems = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ArgumentsError(f"the answers in {file} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            answers[given["question_id"]] = str(given["text"])
        except (ValueError, TypeError, KeyError):
            problems.append(f"line {number} is no answer with question_id and text")
    problems += [f"question {each.id!r} has no answer" for each in questions if each.id not in answers]
    if problems:
        raise ArgumentsError(listing(f"{file} cannot be used as answers", shortened(problems)))
    return answers


def _measure(request: ModalityRequest, name: str, path: str, records: Records, progress: Progress) -> Mapping[str, Any]:
    """Measure what is missing of one model, and return what is known of it."""
    questions = request.chosen.questions
    if (known := records.about()) is not None and all(question.id in records for question in questions):
        progress(name, len(questions), len(questions))
        return known
    opened = open_model(path, request.base, dict(request.how))
    answering = BatchAnswers(opened.loaded, request.images, request.options)
    for done in measure_questions(opened, answering, questions, request.given, records):
        progress(name, done, len(questions))
    return records.note({"kind": opened.kind, "path": path, "base": opened.base})


def _write(summaries: Sequence[Mapping[str, Any]], request: ModalityRequest) -> list[Path]:
    """Write tables and pictures from the summaries."""
    document = {"settings": dict(request.settings), "models": list(summaries)}
    tables = write_tables(document, modality_rows(summaries), request.output / "modality")
    pictures = draw_modality(summaries, request.output / "modality")
    if request.per_head:
        pictures += draw_heads(summaries, request.output / "modality-heads")
    return [*tables, *pictures]
