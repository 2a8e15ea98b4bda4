"""What is tested here needs transformers' own LLaVAs of version 5: `scripts/setup.sh --transformers` installs it."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import pytest

NEEDED = 5


INSTALLED = version("transformers")
IS_NEW = int(INSTALLED.partition(".")[0]) >= NEEDED
if IS_NEW:
    # On processors without AVX-512 the last bits of MKL's products depend on where in memory the operands lie, and
    # trainings are compared to the bit here.
    os.environ.setdefault("MKL_CBWR", "COMPATIBLE")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if IS_NEW:
        return
    reason = (
        f"needs transformers {NEEDED}, here is {INSTALLED}: scripts/setup.sh --transformers makes .venv-transformers"
    )
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
