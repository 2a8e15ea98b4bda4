"""Score given answers by how likely a model finds them, for tasks that compare the likelihoods of choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_steering_plugin.hooks.token_map import IGNORED
from llava_steering_plugin.inference.asking.answering import BatchAnswers
from llava_steering_plugin.inference.asking.forced import ForcedAnswer, force_answer
from llava_steering_plugin.inference.asking.questions import Question
from llava_steering_plugin.inference.context import PromptTokens


@dataclass(frozen=True)
class Likelihood:
    """Says how likely an answer is.

    Attributes:
        logarithm: the sum of its tokens' log-likelihoods, natural; the end of the answer is not among them.
        greedy: each token is the likeliest in its place.
    """

    logarithm: float
    greedy: bool


def forced(answers: BatchAnswers, question: Question, answer: str) -> ForcedAnswer:
    """Write a question with an answer as `answers` asks it; white space around the answer is the template's.

    Args:
        answer: what the model would have to say.
    """
    return force_answer(answers.tokenizer, answers.template(question), answers.said(question), answer.strip())


def likelihoods(answers: BatchAnswers, asked: Sequence[tuple[Question, str]]) -> list[Likelihood]:
    """Return the likelihoods of given answers, all in one pass.

    Args:
        asked: questions, each with an answer.

    Raises:
        ArgumentsError: an image cannot be read.
    """
    model, batch = answers.model, [question for question, _ in asked]
    rows = [forced(answers, question, answer) for question, answer in asked]
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows], device=model.device)
    present = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows], device=model.device)
    # The answer is labelled, as in training: modes that look at the prompt must not see it.
    labels = torch.full_like(ids, IGNORED)
    for number, row in enumerate(rows):
        labels[number, row.answer : len(row.ids)] = ids[number, row.answer : len(row.ids)]
    given = answers.pixels(batch)
    with torch.inference_mode(), answers.uncut():
        logits = model(
            input_ids=ids,
            attention_mask=present,
            labels=labels,
            adapter_names=[question.adapter for question in batch],
            use_cache=False,
            **given,
        ).logits
    ends = _ends(answers, batch, rows, given, logits.shape[1])
    return [likelihood_of(logits[number], row, end) for number, (row, end) in enumerate(zip(rows, ends, strict=True))]


def likelihood_of(logits: Tensor, row: ForcedAnswer, end: int) -> Likelihood:
    """Return the likelihood of an answer.

    Args:
        logits: [positions, vocabulary] of its row.
        end: the position after its last token.
    """
    wanted = torch.tensor(row.ids[row.answer :], dtype=torch.long, device=logits.device)
    predicted = logits[end - 1 - len(wanted) : end - 1].float()
    chosen = predicted.log_softmax(-1).gather(1, wanted[:, None])
    return Likelihood(float(chosen.sum()), bool((predicted.argmax(-1) == wanted).all()))


def _ends(
    answers: BatchAnswers, batch: Sequence[Question], rows: Sequence[ForcedAnswer], given: dict[str, object], width: int
) -> list[int]:
    """Return the position after the last token of each row, with its images in it and the padding where LLaVA puts it.

    Args:
        width: positions of the pass.
    """
    if getattr(answers.model.config, "tokenizer_padding_side", "right") == "left" and given:
        return [width] * len(rows)
    tokens, sizes = PromptTokens.of_model(answers.model), iter(given.get("image_sizes", ()))  # type: ignore[call-overload]
    ends = []
    for question, row in zip(batch, rows, strict=True):
        of_row = [next(sizes) for _ in range(max(1, len(question.images)))] if given else []
        ends.append(tokens.count(row.ids, of_row[: len(question.images)]))
    return ends
