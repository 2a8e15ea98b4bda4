"""What is tested here needs transformers' own LLaVAs of version 5: `scripts/setup.sh --transformers` installs it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

NEEDED = 5


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    installed = version("transformers")
    if int(installed.partition(".")[0]) >= NEEDED:
        return
    reason = (
        f"needs transformers {NEEDED}, here is {installed}: scripts/setup.sh --transformers makes .venv-transformers"
    )
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
