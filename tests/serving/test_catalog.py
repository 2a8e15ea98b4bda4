"""The catalog of adapters: what it refuses, and what it keeps of that. Changes while it serves: http/test_admin.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava_steering_plugin.errors import AdapterError, ArgumentsError

pytest_plugins = ["serving_fixtures", "changing_fixtures"]


def test_whatever_an_odd_adapter_raises_is_its_refusal_and_only_the_newest_are_kept(
    worker: Any, shelf: Path, shown: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(*_: Any) -> None:
        raise KeyError("what nobody has thought of")

    monkeypatch.setattr(worker.pool, "load", odd)
    for number in range(120):
        with pytest.raises(AdapterError, match="KeyError: 'what nobody"):
            worker.catalog.put(f"n{number}", str(shelf / "cats"))
    assert list(worker.catalog.rejected) == [f"n{number}" for number in range(20, 120)]
    with pytest.raises(ArgumentsError):
        worker.catalog.put("x" * 1_000_000, str(shelf / "cats"))
    assert max(map(len, worker.catalog.rejected)) < 10
