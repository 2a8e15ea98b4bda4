"""Fixtures: two tiny LLaVAs in this process, one that tests put adapters on and one that stays as it is.

A test module asks for them with `pytest_plugins = ["steered_fixtures"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from steered import load_llava, strengthen
from tiny_llava import TinyLlava

from llava_steering_plugin import attach, remove, save_adapter
from llava_steering_plugin.adapters.attachment import Attachment, attachment_of
from llava_steering_plugin.modes.mores import MoReS


@pytest.fixture(scope="session")
def frozen(tiny: TinyLlava, patched_llava: Path) -> Any:
    """The base; never attached to."""
    return load_llava(tiny.llava)


@pytest.fixture(scope="session")
def _shared(tiny: TinyLlava, patched_llava: Path) -> Any:
    return load_llava(tiny.llava)


@pytest.fixture
def model(_shared: Any) -> Iterator[Any]:
    """The same LLaVA, without an adapter before and after the test, and with its config as it was."""
    before = dict(_shared.config.__dict__)
    yield _shared
    if attachment_of(_shared) is not None:
        remove(_shared)
    _shared.config.__dict__.clear()
    _shared.config.__dict__.update(before)
    _shared.zero_grad(set_to_none=True)
    _shared.eval()


@pytest.fixture
def steered(model: Any) -> Callable[..., Attachment]:
    """Puts a strong MoReS on `model`: `steered(tokens="f4+l5")`."""

    def put(size: float = 0.3, **settings: Any) -> Attachment:
        return strengthen(attach(model, MoReS(**({"rank": 2, "tokens": "all"} | settings))), size=size)

    return put


@pytest.fixture
def saved(model: Any, steered: Callable[..., Attachment], tmp_path: Path) -> Path:
    """The folder of a strong MoReS; `model` is left without it."""
    steered()
    save_adapter(model, tmp_path / "pets")
    remove(model)
    return tmp_path / "pets"
