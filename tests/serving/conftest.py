"""A fixture that several tests of the serving programs share."""

from __future__ import annotations

from pathlib import Path

import pytest
from asking import Asker
from tiny_llava import TinyLlava


@pytest.fixture(scope="session")
def ask(tiny: TinyLlava, patched_llava: Path) -> Asker:
    """The Python API in this process, which says what every program has to answer."""
    return Asker(tiny.images)
