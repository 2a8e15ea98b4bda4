"""Fixtures: adapters of every kind on disk, and a tiny LLaVA with a pool of them.

A test module asks for them with `pytest_plugins = ["steered_fixtures", "pooled_fixtures"]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pooled import save_all
from steered import load_llava
from tiny_llava import TinyLlava

from llava_steering_plugin import AdapterPool, remove
from llava_steering_plugin.hooks.owner import owner_of


@pytest.fixture(scope="session")
def folders(frozen: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter of each kind in `pooled.MODES`."""
    return save_all(frozen, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def _for_pools(tiny: TinyLlava, patched_llava: Path) -> Any:
    return load_llava(tiny.llava, tokenizer_padding_side="left")


@pytest.fixture
def shared(_for_pools: Any) -> Iterator[Any]:
    """A tiny LLaVA for pools, which pads on the left as batches must; without one before and after the test."""
    yield _for_pools
    if owner_of(_for_pools) is not None:
        remove(_for_pools)


@pytest.fixture
def pool(shared: Any, folders: dict[str, Path]) -> AdapterPool:
    """All adapters of `folders` on `shared`."""
    pool = AdapterPool(shared)
    for name, folder in folders.items():
        pool.load(name, folder)
    return pool
