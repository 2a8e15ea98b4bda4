"""A fixture that several tests of the serving programs share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import Asker
from tiny_llava import TinyLlava


@pytest.fixture(autouse=True)
def gpus_stay_visible() -> Iterator[None]:
    """Programs that run in this process with --device cpu hide them; later tests may need them."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    yield
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if before is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = before


@pytest.fixture(scope="session")
def ask(tiny: TinyLlava, patched_llava: Path) -> Asker:
    """The Python API in this process, which says what every program has to answer."""
    return Asker(tiny.images)
