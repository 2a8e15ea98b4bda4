"""Measure modality attention of one model over a file of questions."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from llava_steering_plugin.diagnostics.positions import TOO_LONG, NotMeasured, forced_pass, prompt_kinds
from llava_steering_plugin.diagnostics.records import KEY, Records
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.inference.asking.answering import BatchAnswers
from llava_steering_plugin.inference.asking.forced import force_answer
from llava_steering_plugin.inference.asking.greedy import until_end
from llava_steering_plugin.inference.asking.questions import Question
from llava_steering_plugin.inference.models import AnsweringModel
from llava_steering_plugin.measures.modality import PADDING, GenerationShares, Kind, Shares, measure_shares

NAMED = 10  # ids in a message


@dataclass(frozen=True)
class Chosen:
    """The questions that are measured.

    Attributes:
        questions: those with an image, in the order of the file.
        text_only: how many were left out because they are about no image.
    """

    questions: Sequence[Question]
    text_only: int


def choose_questions(questions: Sequence[Question], samples: int | None, seed: int) -> Chosen:
    """Choose `samples` of the questions about an image at random; None or more than there are: all of them.

    Raises:
        ArgumentsError: no question is about an image, or two have the same id, by which measurements are kept.
    """
    about_images = [question for question in questions if question.images]
    text_only = len(questions) - len(about_images)
    times = Counter(json.dumps(question.id) for question in about_images)
    if several := [name for name, count in times.items() if count > 1]:
        raise ArgumentsError(
            f"several questions have the same question_id, by which measurements are kept: {', '.join(several[:NAMED])}"
            f"{', ...' if len(several) > NAMED else ''}. Give each its own."
        )
    if not about_images:
        raise ArgumentsError("none of the questions names an image, so there is nothing to compare the text with.")
    if samples is not None and samples < len(about_images):
        numbers = sorted(random.Random(seed).sample(range(len(about_images)), samples))
        about_images = [about_images[number] for number in numbers]
    return Chosen(about_images, text_only)


def measure_questions(
    opened: AnsweringModel,
    answering: BatchAnswers,
    questions: Sequence[Question],
    given: Mapping[Any, str] | None,
    records: Records,
) -> Iterator[int]:
    """Measure the questions that `records` lacks, and yield the number of those that are done, a batch at a time.

    Args:
        answering: asks the model; its batch size holds for the generation. Passes over given answers go one by one, so
            that memory does not grow with the batch.
        given: the answers to measure, by question id; None: the model's own, measured while `answering` generates them.

    Raises:
        ArgumentsError: an image cannot be read.
        SteeringError: the model's attention cannot be read.
    """
    asked = [replace(question, adapter=opened.adapter) for question in questions]
    missing = [question for question in asked if question.id not in records]
    done = len(asked) - len(missing)
    yield done
    size = answering.options.batch_size
    for start in range(0, len(missing), size):
        batch = missing[start : start + size]
        if given is None:
            rows = _while_generating(opened, answering, batch)
        else:
            rows = (_afterwards(opened, answering, question, given[question.id]) for question in batch)
        for question, row in zip(batch, rows, strict=True):
            records.add({KEY: question.id} | row)
        done += len(batch)
        yield done


def shares_of(record: Mapping[str, Any]) -> Shares | None:
    """Return the measurement of a record; None if the question was left out."""
    if "left_out" in record:
        return None
    counts = {kind: record["counts"][kind.name.lower()] for kind in Kind}
    shares = torch.stack([torch.tensor(record["shares"][kind.name.lower()]).double() for kind in Kind], -1)
    return Shares(counts, record["queries"], shares)


def _while_generating(
    opened: AnsweringModel, answering: BatchAnswers, batch: Sequence[Question]
) -> Iterator[dict[str, Any]]:
    """Yield the records of a batch, without the ids: the model answers, and is measured meanwhile."""
    model, tokenizer = opened.loaded.pool.model, opened.loaded.tokenizer
    prompts = [force_answer(tokenizer, answering.template(each), answering.said(each), []) for each in batch]
    measure = GenerationShares(model, lambda: prompt_kinds(prompts))
    with measure.watching():
        answers = answer_ids(answering.generated(batch), tokenizer)
    for row, (question, answer) in enumerate(zip(batch, answers, strict=True)):
        if not measure.whole:  # the cache keeps only a part of the keys
            yield _afterwards(opened, answering, question, answer)
            continue
        queries = len(answer) - (len(answer) > 1 and answer[-1] == tokenizer.eos_token_id)
        length = int((measure.prompts[row] != PADDING).sum()) + queries
        most = getattr(model.config, "tokenizer_model_max_length", None)
        text = tokenizer.decode(answer, skip_special_tokens=True)
        if most is not None and length > most:
            yield _left_out(TOO_LONG, f"with its answer it has {length} tokens, and the model reads {most}.", text)
        else:
            yield _record(measure.of(row, queries), text)


def _afterwards(
    opened: AnsweringModel, answering: BatchAnswers, question: Question, answer: str | list[int]
) -> dict[str, Any]:
    """Return the record of one question, without its id: the model reads its answer in one pass."""
    tokenizer = opened.loaded.tokenizer
    forced = force_answer(tokenizer, answering.template(question), answering.said(question), answer)
    text = answer if isinstance(answer, str) else tokenizer.decode(answer, skip_special_tokens=True)
    model, pixels = opened.loaded.pool.model, answering.pixels([question])
    try:
        this_pass = forced_pass(model, forced, pixels, opened.adapter)
    except NotMeasured as error:
        return _left_out(error.reason, str(error), text)
    (shares,) = measure_shares(model, this_pass.forward, this_pass.kinds)
    return _record(shares, text)


def _record(shares: Shares, answer: str) -> dict[str, Any]:
    if not bool(shares.shares.isfinite().all()):
        return _left_out("not finite", "the model computes NaN or infinite numbers.", answer)
    return {
        "answer": answer.strip(),
        "queries": shares.queries,
        "counts": {kind.name.lower(): shares.counts[kind] for kind in Kind},
        "shares": {kind.name.lower(): _rounded(shares.shares[..., kind]) for kind in Kind},
    }


def _left_out(reason: str, details: str, answer: str) -> dict[str, Any]:
    return {"left_out": reason, "details": details, "answer": answer.strip()}


def _rounded(values: torch.Tensor) -> list[list[float]]:
    """Return [layers, heads] as JSON keeps it: seven digits are more than the half precision of most models."""
    return [[float(f"{value:.7g}") for value in row] for row in values.tolist()]


def answer_ids(generated: torch.Tensor, tokenizer: Any) -> list[list[int]]:
    """Return the token ids of each row's answer, up to its end."""
    return [until_end(row, tokenizer) for row in generated.tolist()]
