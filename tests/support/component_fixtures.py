"""The tiny towers of `tiny_towers.py` as a fixture."""

from __future__ import annotations

import pytest
from tiny_llava import TinyLlava
from tiny_towers import TinyTowers, build_towers


@pytest.fixture(scope="session")
def towers(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> TinyTowers:
    """SigLIP and DINOv2 on disk, shared by all tests: read them, never write to them."""
    return build_towers(tmp_path_factory.mktemp("towers"), tiny)
