"""Fixtures: questions to several adapters, and `llava-steering eval` in this process.

A test module asks for them with `pytest_plugins = ["evaluating_fixtures", "pooled_fixtures", "steered_fixtures"]`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pooled import BASE
from tiny_llava import TinyLlava
from typer.testing import CliRunner

from llava_steering_plugin.cli import app
from llava_steering_plugin.errors import SteeringError

ADAPTERS = ("cats", "pets", "birds", "bats", "newts")
SHORT = 12

Evaluate = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def questions(tiny: TinyLlava) -> list[dict[str, Any]]:
    """Upstream's questions, one each without an image and with a longer text, asked of several adapters in turn."""
    asked = [json.loads(line) for line in tiny.questions.read_text().splitlines()]
    asked[1] |= {"text": "What color is the circle in the picture, and how many sides does a triangle have?"}
    # In half precision a padded batch rounds otherwise than a row alone: no answer here may hang on a tie.
    asked[2] |= {"text": "Is it red?"}
    asked.append({"question_id": "text", "text": "How many sides does a triangle have?"})
    for number, question in enumerate(asked):
        question["adapter"] = (*ADAPTERS, BASE)[number % (len(ADAPTERS) + 1)]
    return asked


@pytest.fixture
def evaluate(tiny: TinyLlava, folders: dict[str, Path], tmp_path: Path) -> Evaluate:
    """Runs `llava-steering eval` with all adapters; returns the lines of the answer file."""

    def run(
        questions: list[dict[str, Any]], *flags: str, base: Path = tiny.llava, images: Path = tiny.images
    ) -> list[dict[str, Any]]:
        file, answers = tmp_path / "question.jsonl", tmp_path / "made" / "answer.jsonl"
        file.write_text("".join(json.dumps(question) + "\n" for question in questions))
        given = [word for name in ADAPTERS for word in ("--adapter", f"{name}={folders[name]}")]
        files = ["--question-file", file, "--image-folder", images, "--answers-file", answers]
        words = ["eval", base, *files, "--device", "cpu", "--max-new-tokens", SHORT, *given, *flags]
        result = CliRunner().invoke(app, [str(word) for word in words])
        if isinstance(result.exception, SteeringError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in answers.read_text().splitlines()]

    return run
