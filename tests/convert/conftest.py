"""The authors' golden checkpoints, to be changed and as they convert."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from released_checkpoints import METHODS, golden, golden_base

from llava_steering_plugin.convert.conversion import Conversion, convert


@pytest.fixture
def released(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a golden checkpoint, to be changed."""

    def copy(method: str) -> Path:
        return Path(shutil.copytree(golden(method), tmp_path / f"{method}_released"))

    return copy


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Conversion]:
    target = tmp_path_factory.mktemp("converted")
    return {method: convert(golden(method), target / method, golden_base(method)) for method in METHODS}
