"""Time answers of an adapter beside the base's: the same questions, in turns, on the same machine at the same time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from llava_steering_plugin.inference.asking.answering import BatchAnswers
from llava_steering_plugin.inference.asking.questions import Question
from llava_steering_plugin.pool.pool import BASE

ROUNDS = 3
# Every answer has as many tokens, or a model of short answers would seem faster.
TOKENS = 16


def time_answers(answers: BatchAnswers, questions: Sequence[Question]) -> dict[str, Any]:
    """Return the seconds of an answer, by the adapters that the questions ask and by the base.

    The first batch of the questions is answered in turns; the median of the turns counts, after one to warm up. All
    answers have the same number of tokens.

    Returns:
        `seconds` and `base_seconds`: of a question; `ratio`: the median of the turns' ratios; `questions`: in the
        batch; `tokens`: of an answer.
    """
    batch = list(questions[: answers.options.batch_size])
    tokens = min(TOKENS, answers.options.generation.get("max_new_tokens", TOKENS))
    generation = {**answers.options.generation, "max_new_tokens": tokens, "min_new_tokens": tokens}
    timed = answers.with_options(replace(answers.options, generation=generation))
    of_base = [replace(question, adapter=BASE) for question in batch]
    turns = [(_seconds(timed, batch), _seconds(timed, of_base)) for _ in range(ROUNDS + 1)][1:]
    return {
        "seconds": statistics.median(own for own, _ in turns) / len(batch),
        "base_seconds": statistics.median(base for _, base in turns) / len(batch),
        "ratio": statistics.median(own / base for own, base in turns),
        "questions": len(batch),
        "tokens": tokens,
    }


def _seconds(answers: BatchAnswers, batch: Sequence[Question]) -> float:
    devices = [answers.model.device] if answers.model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        begun = time.perf_counter()
        answers.generated(batch)
        if devices:
            torch.cuda.synchronize()
        return time.perf_counter() - begun
