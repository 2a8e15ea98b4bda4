"""Likelihoods of given answers, in batches of unlike rows, are those of one token after the other, each row alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from steered import IGNORED
from tiny_llava import TinyLlava

from llava_steering_plugin.inference.asking.answering import AnswerOptions, BatchAnswers
from llava_steering_plugin.inference.asking.forced import ForcedAnswer
from llava_steering_plugin.inference.asking.likelihood import Likelihood, likelihood_of, likelihoods
from llava_steering_plugin.inference.asking.questions import Question
from llava_steering_plugin.inference.base_model import LoadedBase
from llava_steering_plugin.pool.pool import BASE, AdapterPool

pytest_plugins = ["pooled_fixtures", "steered_fixtures"]


@pytest.fixture(scope="module")
def tokenizer(tiny: TinyLlava) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny.llava, use_fast=False)


@pytest.fixture
def answers(pool: AdapterPool, tokenizer: Any, tiny: TinyLlava) -> BatchAnswers:
    from transformers import CLIPImageProcessor

    loaded = LoadedBase(pool, tokenizer, CLIPImageProcessor.from_pretrained(tiny.tower))
    answers = BatchAnswers(loaded, tiny.images, AnswerOptions(4, None, {}))
    half = answers.pixels

    def in_float32(batch: Any) -> dict[str, Any]:  # the model here is; upstream's loader would have made it half
        given = half(batch)
        return given | {"images": given["images"].float()} if given else given

    answers.pixels = in_float32  # type: ignore[method-assign]
    return answers


ASKED = [
    (Question(0, "What color is the circle?", ("00.png",), "cats"), "It is red."),
    (Question(1, "How many sides does a triangle have?", (), "pets"), " three"),
    (Question(2, "Is one of them red?", ("01.png", "02.png"), BASE), "Yes, a red circle with two friends."),
    (Question(3, "Is it a circle?", ("03.png",), "birds"), "Yes"),
]


def one_token_after_the_other(answers: BatchAnswers, question: Question, answer: str) -> Likelihood:
    prompt = answers.prompt_ids(question)
    end = [i for i in answers.tokenizer(answer.strip()).input_ids if i != answers.tokenizer.bos_token_id]
    total, greedy = 0.0, True
    for number, wanted in enumerate(end):
        ids = torch.tensor([[*prompt, *end[:number]]])
        labels = torch.tensor([[IGNORED] * len(prompt) + end[:number]])  # MixLoRA routes by the prompt alone
        with torch.inference_mode():
            logits = answers.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                labels=labels,
                adapter_names=question.adapter,
                **answers.pixels([question]),
            ).logits[0, -1]
        total += float(logits.log_softmax(-1)[wanted])
        greedy &= int(logits.argmax()) == wanted
    return Likelihood(total, greedy)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_unlike_rows_is_scored_as_one_token_after_the_other(answers: BatchAnswers, side: str) -> None:
    before = answers.model.config.tokenizer_padding_side
    answers.model.config.tokenizer_padding_side = side
    try:
        found = likelihoods(answers, ASKED)
        texts = likelihoods(answers, ASKED[1:2])
    finally:
        answers.model.config.tokenizer_padding_side = before
    alone = [one_token_after_the_other(answers, *each) for each in ASKED]
    assert [each.logarithm for each in found] == pytest.approx([each.logarithm for each in alone], abs=1e-3)
    assert [each.greedy for each in found] == [each.greedy for each in alone]
    assert texts[0].logarithm == pytest.approx(alone[1].logarithm, abs=1e-3)
    assert len({round(each.logarithm, 3) for each in found}) == len(ASKED)


def test_an_answer_is_greedy_if_each_of_its_tokens_is_the_likeliest_in_its_place() -> None:
    logits = torch.full((5, 8), -1.0)  # a prompt of three tokens and an answer of two
    logits[2, 6] = logits[3, 7] = 2.0
    likely = 2 - torch.logsumexp(torch.tensor([2.0] + [-1.0] * 7), 0)
    greedy, other = (likelihood_of(logits, ForcedAnswer([1, 4, 5, 6, last], True, range(0), 3), 5) for last in (7, 3))
    assert greedy.greedy and greedy.logarithm == pytest.approx(float(2 * likely))
    assert not other.greedy and other.logarithm == pytest.approx(float(2 * likely) - 3)


def test_an_answer_of_nothing_is_certain(answers: BatchAnswers) -> None:
    assert likelihoods(answers, [(ASKED[0][0], " ")]) == [Likelihood(0.0, True)]


def test_a_missing_image_is_named(answers: BatchAnswers, tmp_path: Path) -> None:
    from llava_steering_plugin.errors import ArgumentsError

    answers.images = tmp_path
    with pytest.raises(ArgumentsError, match=r"question 0 cannot be asked: there is no file .*00\.png"):
        likelihoods(answers, ASKED)
