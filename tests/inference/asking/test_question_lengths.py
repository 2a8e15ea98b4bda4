"""Questions that are longer than the model's context are named before a model is loaded: LLaVA would cut their end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from evaluating_fixtures import Evaluate
from tiny_llava import VISUAL_TOKENS, TinyLlava

from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.inference.asking.question_lengths import NAMED, check_lengths
from llava_steering_plugin.inference.asking.questions import Question

pytest_plugins = ["evaluating_fixtures", "pooled_fixtures", "steered_fixtures"]


@pytest.fixture
def check(tiny: TinyLlava, patched_llava: Path) -> Any:
    """Checks questions for a base with these entries in its config."""
    described = json.loads((tiny.llava / "config.json").read_text())

    def run(questions: list[Question], new: int = 1, **config: Any) -> list[str]:
        return check_lengths(questions, tiny.images, str(tiny.llava), described | config, {}, new)

    return run


def words(count: int, name: str = "q", images: tuple[str, ...] = ("00.png",)) -> Question:
    return Question(name, " ".join(["red"] * count), images, "__base__")


def length_of(check: Any, question: Question) -> int:
    """The length that the message names."""
    with pytest.raises(ArgumentsError) as refused:
        check([question], max_position_embeddings=8)
    return int(re.findall(r"question 'q': (\d+) tokens", str(refused.value))[0])


def test_a_question_may_have_as_many_tokens_as_the_model_sees_and_not_one_more(check: Any) -> None:
    length = length_of(check, words(30))
    assert length > length_of(check, words(30, images=())) + VISUAL_TOKENS
    assert check([words(30)], tokenizer_model_max_length=length) == []
    with pytest.raises(ArgumentsError, match=rf"question 'q': {length} tokens; the model takes {length - 1}$"):
        check([words(30)], tokenizer_model_max_length=length - 1)
    # Prompts without an image are not cut there; they end with the positions.
    assert check([words(30, images=())], tokenizer_model_max_length=10) == []
    with pytest.raises(ArgumentsError, match=r"question 'q'"):
        check([words(30, images=())], max_position_embeddings=30)


def test_answers_that_may_run_out_of_the_context_are_noted(check: Any) -> None:
    length = length_of(check, words(30))
    assert check([words(30)], new=10, max_position_embeddings=length + 10) == []
    (note,) = check([words(30), words(3, "short")], new=11, max_position_embeddings=length + 10)
    assert "1 answer(s)" in note and "question 'q'" in note and "--max-new-tokens" in note


def test_the_rest_of_many_is_counted(check: Any) -> None:
    with pytest.raises(ArgumentsError) as refused:
        check([words(30, f"q{number}") for number in range(NAMED + 5)], max_position_embeddings=20)
    assert str(refused.value).count("question 'q") == NAMED and "and 5 more" in str(refused.value)


def test_eval_names_questions_that_would_be_cut_before_it_loads_a_model(
    evaluate: Evaluate, questions: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two questions behind a long text got one answer: LLaVA had cut both off."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("llava_steering_plugin.inference.base_model.load_base", load)
    long = " ".join(["red circle"] * 1200)
    asked = [
        questions[0],
        questions[1] | {"question_id": "one", "text": f"{long} What color is it?"},
        questions[2] | {"question_id": "two", "text": f"{long} What shape is it?"},
    ]
    with pytest.raises(SteeringError, match=r"(?s)2 question\(s\) are longer .*question 'one': .*question 'two': "):
        evaluate(asked)
