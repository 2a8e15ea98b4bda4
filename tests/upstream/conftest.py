"""Fixtures that the tests of upstream's programs share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from asking import Question
from served import Served, train_adapters
from tiny_llava import TinyLlava


@pytest.fixture(scope="session")
def served(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Trained adapters, their bases, and misleading names for them; read-only."""
    return train_adapters(tiny, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def questions(tiny: TinyLlava) -> list[Question]:
    lines = [json.loads(line) for line in tiny.questions.read_text().splitlines()]
    return [Question(line["text"], line["image"]) for line in lines]
