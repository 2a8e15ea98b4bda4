"""What is tested here needs the newest transformers that LLaVA trains in: `scripts/setup.sh --newer-transformers`."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from tiny_language_models import NEWER, build
from tiny_llava import TinyLlava
from trained_families import Trainings

NEEDED = (4, 51)  # the first with Qwen3; from 5 on, LLaVA's train() does not run


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    installed = version("transformers")
    if NEEDED <= tuple(map(int, installed.split(".")[:2])) < (5, 0):
        return
    reason = f"needs transformers 4.51 to 4.57, here is {installed}: scripts/setup.sh --newer-transformers has 4.57.6"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def train(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    root = tmp_path_factory.mktemp("newer")
    bases = {family.name: build(family, tiny, root / family.name) for family in NEWER}
    return Trainings(tiny, bases, tmp_path_factory.mktemp)
