"""Requests of lmms-eval get the answers that `llava-steering eval` gives, in its batches: harness/answers.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_llava import TinyLlava

from llava_steering_plugin.errors import ArgumentsError, NotFiniteError
from llava_steering_plugin.harness.answers import HarnessAnswers
from llava_steering_plugin.harness.arguments import ModelArguments
from llava_steering_plugin.inference.asking.answering import AnswerOptions, BatchAnswers
from llava_steering_plugin.inference.asking.likelihood import likelihoods
from llava_steering_plugin.inference.asking.questions import Question
from llava_steering_plugin.inference.models import AnsweringModel, open_model

pytest_plugins = ["pooled_fixtures", "steered_fixtures"]

FILES = [["00.png"], [], ["01.png", "02.png"], ["03.png"], ["00.png"]]
TEXTS = ["What color is it?", "How many sides has a triangle?", "Which is red?", "Is it blue?", "What shape is red?"]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "until": []}
Answering = tuple[AnsweringModel, TinyLlava]


@pytest.fixture(scope="module")
def opened(tiny: TinyLlava, folders: dict[str, Path], patched_llava: Path) -> AnsweringModel:
    return open_model(str(folders["cats"]), str(tiny.llava), {"device": "cpu"})


@pytest.fixture
def arguments() -> ModelArguments:
    return ModelArguments("cats", None, None, False, False, "cpu", 2, 0, "refuse")


@pytest.fixture
def documents(tiny: TinyLlava) -> dict[str, dict[str, list[dict[str, Any]]]]:
    return {"shapes": {"test": [{"shown": [str(tiny.images / name) for name in names]} for names in FILES]}}


def show(document: Any) -> list[Image.Image]:
    return [Image.open(path) for path in document["shown"]]


def requests(kwargs: Any = None, texts: list[str] = TEXTS) -> list[Any]:
    return [(text, dict(kwargs or GREEDY), show, number, "shapes", "test") for number, text in enumerate(texts)]


def by_eval(opened: AnsweringModel, tiny: TinyLlava, numbers: list[int], **generation: Any) -> list[str]:
    """What `eval` answers, in batches of two."""
    options = AnswerOptions(2, None, {"num_beams": 1, "use_cache": True, "do_sample": False, **generation})
    answers = BatchAnswers(opened.loaded, tiny.images, options)
    asked = [Question(number, TEXTS[number], tuple(FILES[number]), opened.adapter) for number in numbers]
    return [answer.text for _, _, batch in answers.batches(asked) for answer in batch]


def test_answers_are_those_of_eval_and_progress_is_told(
    opened: AnsweringModel, arguments: ModelArguments, documents: Any, tiny: TinyLlava
) -> None:
    seen: list[int] = []
    found = HarnessAnswers(opened, arguments, documents).generated(requests(), seen.append)
    assert found == by_eval(opened, tiny, list(range(5)), max_new_tokens=8)
    assert seen == [2, 2, 1] and all(found)


def test_requests_that_generate_alike_share_batches_and_answers_keep_their_places(
    opened: AnsweringModel, arguments: ModelArguments, documents: Any, tiny: TinyLlava
) -> None:
    asked = requests()
    for number in (1, 3):
        asked[number][1]["max_new_tokens"] = 3
    found = HarnessAnswers(opened, arguments, documents).generated(asked, lambda count: None)
    long, short = (by_eval(opened, tiny, numbers, max_new_tokens=n) for numbers, n in (([0, 2, 4], 8), ([1, 3], 3)))
    assert found == [long[0], short[0], long[1], short[1], long[2]]


def test_until_cuts_an_answer_and_ends_its_generation(
    opened: AnsweringModel, arguments: ModelArguments, documents: Any
) -> None:
    answers = HarnessAnswers(opened, replace(arguments, batch_size=1), documents)
    (whole,) = answers.generated(requests()[:1], lambda count: None)
    end = whole[3:5]
    (cut,) = answers.generated(requests(GREEDY | {"until": [end], "max_new_tokens": 2000})[:1], lambda count: None)
    assert cut == whole.split(end)[0].strip() != whole


def test_what_is_longer_than_the_context_ends_the_run_or_stays_empty(
    opened: AnsweringModel, arguments: ModelArguments, documents: Any, tiny: TinyLlava, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [TEXTS[0], "red " * 3000, *TEXTS[2:]]
    with pytest.raises(ArgumentsError, match=r"(?s)1 item.*too_long=empty in --model_args.*shapes/1: .* takes 2,047"):
        HarnessAnswers(opened, arguments, documents).generated(requests(texts=texts), lambda count: None)
    empty = HarnessAnswers(opened, replace(arguments, too_long="empty"), documents)
    found = empty.generated(requests(texts=texts), lambda count: None)
    others = by_eval(opened, tiny, [0, 2, 3, 4], max_new_tokens=8)
    assert found == [others[0], "", *others[1:]]
    assert "shapes/1" in caplog.text


def test_choices_are_scored_by_the_negative_log_likelihood_of_each(
    opened: AnsweringModel, arguments: ModelArguments, documents: Any, tiny: TinyLlava
) -> None:
    answers = BatchAnswers(opened.loaded, tiny.images, AnswerOptions(2, None, {}))
    choices = [" red", " a blue circle"]
    asked = [(TEXTS[n], choice, show, n, "shapes", "test") for n in (0, 2) for choice in choices]
    asked.append((TEXTS[0], lambda document: "red", show, 0, "shapes", "test"))
    found = HarnessAnswers(opened, arguments, documents).likelihoods(asked, lambda count: None)
    for place, n in enumerate((0, 2)):
        question = Question(n, TEXTS[n], tuple(FILES[n]), opened.adapter)
        expected = likelihoods(answers, [(question, choice) for choice in choices])
        assert found[2 * place : 2 * place + 2] == [(-each.logarithm, each.greedy) for each in expected]
    assert found[4][0] == pytest.approx(found[0][0], rel=1e-2)
    assert all(number > 0 for number, _ in found)
    with pytest.raises(ArgumentsError, match="longer than the model's context"):
        asked = [("red " * 3000, " red", show, 1, "shapes", "test")]
        HarnessAnswers(opened, replace(arguments, too_long="empty"), documents).likelihoods(asked, lambda count: None)


def test_an_empty_choice_which_would_always_be_the_likeliest_is_refused(
    opened: AnsweringModel, arguments: ModelArguments, documents: Any
) -> None:
    asked = [(TEXTS[0], choice, show, 0, "shapes", "test") for choice in (" red", " ")]
    with pytest.raises(ArgumentsError, match=r"(?s)1 choice\(s\) are empty.*shapes/0"):
        HarnessAnswers(opened, arguments, documents).likelihoods(asked, lambda count: None)


def test_an_item_without_an_answer_ends_the_run_and_is_named(
    opened: AnsweringModel, arguments: ModelArguments, documents: Any
) -> None:
    module = next(iter(opened.loaded.pool.modules(opened.adapter).values()))
    parameter = dict(module.named_parameters())["vis.steer_offset"]
    before = parameter.detach().clone()
    parameter.data.fill_(float("nan"))
    try:
        answers = HarnessAnswers(opened, arguments, documents)
        with pytest.raises(NotFiniteError, match=r"shapes/0"):
            answers.generated(requests(), lambda count: None)
        with pytest.raises(NotFiniteError, match=r"(?s)1 choice\(s\) have no likelihood: .*shapes/0"):
            answers.likelihoods([(TEXTS[0], " red", show, 0, "shapes", "test")], lambda count: None)
    finally:
        parameter.data.copy_(before)
