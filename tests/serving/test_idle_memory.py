"""What a worker does about memory before it computes anything."""

from __future__ import annotations

import os

import pytest

from llava_steering_plugin.serving.idle_memory import KEPT_OPERATIONS, keep_few_operations


def test_few_operations_are_kept_unless_the_environment_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in KEPT_OPERATIONS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "500")
    keep_few_operations()
    assert os.environ["LRU_CACHE_CAPACITY"] == "500"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "128"
