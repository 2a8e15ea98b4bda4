"""Measure the steering of several adapters one after another, and write what came out."""

from __future__ import annotations

import gc
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_steering_plugin.adapters.attachment import required
from llava_steering_plugin.diagnostics.pictures.steering import draw_steering
from llava_steering_plugin.diagnostics.records import Records, open_records
from llava_steering_plugin.diagnostics.results import Progress, write_tables
from llava_steering_plugin.diagnostics.steering.one_model import (
    Prepare,
    chosen_tokens,
    load_bases,
    measure_steering,
    questions_prepared,
    samples_prepared,
    save_bases,
    steered_model,
)
from llava_steering_plugin.diagnostics.steering.summary import compare_subspaces, steering_rows, summarise_steering
from llava_steering_plugin.diagnostics.task_data import CONVERSATION, Sample, check_samples, read_entries
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.inference.asking.questions import Question
from llava_steering_plugin.inference.training_samples import TrainingSamples
from llava_steering_plugin.inference.tunable import TunableModel, open_tunable
from llava_steering_plugin.upstream.text.conversations import checked_template


@dataclass(frozen=True)
class Answers:
    """The answers that are measured: to questions, or those of training data.

    Attributes:
        keys: question ids, or the numbers of samples.
        without_image: how many questions or samples were left out because they are about no image.
        questions: None: the answers are those of `data`.
        given: the answers by question id; None: each adapter's own, greedy.
        data: LLaVA's training JSON; None: the answers are to `questions`.
    """

    keys: Sequence[Any]
    without_image: int
    questions: Sequence[Question] | None = None
    given: Mapping[Any, str] | None = None
    data: Path | None = None


@dataclass(frozen=True)
class SteeringRequest:
    """Holds what is asked of one run.

    Attributes:
        models: the path of each adapter, by the name that pictures and tables give it.
        answers: what is measured.
        images: the folder of the images.
        settings: what measurements depend on besides the adapter.
        conversation: the template; None: each adapter's own.
        max_new_tokens: of a greedy answer.
        base: where the base is, if it has moved.
        how: `device`, `load_4bit`, `load_8bit`.
        output: the folder of everything that is written.
    """

    models: Mapping[str, str]
    answers: Answers
    images: Path
    settings: Mapping[str, Any]
    conversation: str | None
    max_new_tokens: int
    base: str | None
    how: Mapping[str, Any]
    output: Path


def choose_data(data: Path, samples: int | None, seed: int, images: Path, conversation: str | None) -> Answers:
    """Choose `samples` of a data file's samples with an image at random; None or more than there are: all of them.

    Raises:
        ArgumentsError: the file cannot be read, no sample has an image, or LLaVA cannot be trained on a chosen one.
    """
    files = [(None, data)]
    entries = read_entries(files)
    listed = entries[0][1]
    seen = [number for number, entry in enumerate(listed) if entry.get("image")]
    if not seen:
        raise ArgumentsError(f"no sample of {data} has an image, and MoReS steers none without one.")
    chosen = sorted(random.Random(seed).sample(seen, min(samples or len(seen), len(seen))))
    check_samples(files, entries, [Sample(0, number) for number in chosen], images, conversation)
    return Answers(chosen, len(listed) - len(seen), data=data)


def run_steering(request: SteeringRequest, progress: Progress) -> list[Path]:
    """Measure all adapters, and return the files of the result.

    Raises:
        SteeringError: a model cannot be loaded, or a file cannot be read; what was measured before is kept.
    """
    kept = open_records(request.output / "steering", request.settings, request.models, request.base)
    summaries, bases = [], {}
    for name, path in request.models.items():
        about = _measure(request, name, path, kept[name], progress)
        bases[name] = load_bases(_bases_file(request, name))
        summaries.append(summarise_steering(name, about, kept[name], bases[name], request.answers.without_image))
        gc.collect()  # the next model needs the memory
    document = {"settings": dict(request.settings), "models": summaries, "pairs": compare_subspaces(bases)}
    target = request.output / "steering"
    return [*write_tables(document, steering_rows(document), target), *draw_steering(document, target)]


def _measure(request: SteeringRequest, name: str, path: str, records: Records, progress: Progress) -> dict[str, Any]:
    """Measure what is missing of one adapter, and return what is known of it."""
    keys = request.answers.keys
    bases, known = _bases_file(request, name), records.about()
    if known is not None and all(key in records for key in keys) and bases.is_file():
        progress(name, len(keys), len(keys))
        return known
    opened = open_tunable(path, request.base, request.how)
    steered = steered_model(opened.model)
    template = checked_template(request.conversation or opened.conversation or CONVERSATION)
    for done in measure_steering(steered, keys, _prepare(request, opened, template), records):
        progress(name, done, len(keys))
    save_bases(steered, bases)
    return records.note(
        {
            "kind": opened.kind,
            "path": path,
            "base": opened.base,
            "conversation": template,
            "adapter": required(opened.model).mode.settings(),
            "tokens": chosen_tokens(steered),
        }
    )


def _prepare(request: SteeringRequest, opened: TunableModel, template: str) -> Prepare:
    answers = request.answers
    if answers.questions is None:
        assert answers.data is not None
        return samples_prepared(
            TrainingSamples(opened.model, opened.tokenizer, opened.processor, answers.data, request.images, template)
        )
    return questions_prepared(
        opened, answers.questions, answers.given, request.images, template, request.max_new_tokens
    )


def _bases_file(request: SteeringRequest, name: str) -> Path:
    return request.output / "steering" / f"{name}.safetensors"
