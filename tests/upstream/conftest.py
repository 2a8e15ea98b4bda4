"""Fixtures that the tests of upstream's programs share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from asking import Question
from served import Served, train_adapters
from tiny_language_models import FAMILIES, build
from tiny_llava import TinyLlava


@pytest.fixture(scope="session")
def served(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Trained adapters, their bases, and misleading names for them; read-only."""
    return train_adapters(tiny, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def questions(tiny: TinyLlava) -> list[Question]:
    lines = [json.loads(line) for line in tiny.questions.read_text().splitlines()]
    return [Question(line["text"], line["image"]) for line in lines]


@pytest.fixture(scope="session")
def language_models(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain language model of each family, by the name of its component; read-only."""
    root = tmp_path_factory.mktemp("language-models")
    return {family.name: build(family, tiny, root / family.name) for family in FAMILIES}
