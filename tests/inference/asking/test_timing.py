"""`eval --timing` times an adapter beside its base, in answers of one length; and `eval` answers with a LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from asking import Asker, Question
from evaluating_fixtures import ADAPTERS, SHORT, Evaluate
from lora_folders import save_lora
from pooled import BASE
from steered import load_llava
from tiny_llava import TinyLlava
from typer.testing import CliRunner

from llava_steering_plugin.cli import app
from llava_steering_plugin.inference.asking import timing
from llava_steering_plugin.inference.asking.answering import BatchAnswers

pytest_plugins = ["evaluating_fixtures", "pooled_fixtures", "steered_fixtures"]


def test_the_same_questions_are_answered_in_turns_with_as_many_tokens(
    evaluate: Evaluate, questions: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[set[str], int, dict[str, Any]]] = []
    generated = BatchAnswers.generated

    def noted(self: BatchAnswers, batch: list[Any]) -> Any:
        seen.append(({each.adapter for each in batch}, len(batch), self.options.generation))
        return generated(self, batch)

    plain = evaluate(questions)
    monkeypatch.setattr(BatchAnswers, "generated", noted)
    answers = evaluate(questions, "--timing", str(tmp_path / "timing.json"), "--batch-size", "3")
    assert [line["text"] for line in answers] == [line["text"] for line in plain], "the answers are as without"
    turns = seen[-2 * (timing.ROUNDS + 1) :]
    assert [names for names, _, _ in turns] == [set(ADAPTERS[:3]), {BASE}] * (timing.ROUNDS + 1)
    for _, rows, generation in turns:
        assert rows == 3
        assert generation["min_new_tokens"] == generation["max_new_tokens"] == SHORT, "also of a model of short answers"
    found = json.loads((tmp_path / "timing.json").read_text())
    assert (found["questions"], found["tokens"]) == (3, SHORT)
    assert found["seconds"] > 0 and found["base_seconds"] > 0 and found["ratio"] > 0


def run(*words: object) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_lora_in_the_place_of_a_base_answers_as_upstreams_loader_has_it(
    tiny: TinyLlava, ask: Asker, tmp_path: Path
) -> None:
    lora = save_lora(load_llava(tiny.llava), tmp_path / "llava-lora", tiny.llava)
    files = ["--question-file", tiny.questions, "--image-folder", tiny.images, "--device", "cpu"]
    texts = {}
    for name, model in (("base", tiny.llava), ("lora", lora)):
        answers = tmp_path / f"{name}.jsonl"
        run("eval", model, *files, "--answers-file", answers, "--max-new-tokens", 6, "--conv-mode", "v1")
        texts[name] = [json.loads(line)["text"] for line in answers.read_text().splitlines()]
    asked = [json.loads(line) for line in tiny.questions.read_text().splitlines()]
    expected = [
        ask(lora, Question(each["text"], each["image"]), base=str(tiny.llava), conversation="v1", max_new_tokens=6)
        for each in asked
    ]
    assert texts["lora"] == expected != texts["base"]


def test_a_file_of_times_that_cannot_be_written_is_refused_first(tiny: TinyLlava, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = ["eval", tiny.llava, "--question-file", tiny.questions, "--image-folder", tiny.images]
    with pytest.raises(Exception, match=r"--timing .* cannot be written"):
        run(*words, "--answers-file", tmp_path / "a.jsonl", "--timing", tmp_path / "file" / "timing.json")
