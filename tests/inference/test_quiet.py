"""What libraries log while a model loads is hidden for a while (`inference/quiet.py`)."""

from __future__ import annotations

import logging
import warnings

import pytest
import transformers

from llava_steering_plugin.inference.quiet import quiet_libraries


def test_libraries_are_quiet_inside_the_block_alone() -> None:
    def now() -> tuple[int, int, list[object]]:
        return transformers.logging.get_verbosity(), logging.getLogger("DeepSpeed").level, list(warnings.filters)

    before = now()
    with quiet_libraries():
        assert transformers.logging.get_verbosity() == logging.ERROR
        assert not logging.getLogger("DeepSpeed").isEnabledFor(logging.WARNING)
    assert now() == before


def test_nothing_is_hidden_from_those_who_log_debug_messages(caplog: pytest.LogCaptureFixture) -> None:
    verbosity = transformers.logging.get_verbosity()
    with caplog.at_level(logging.DEBUG), quiet_libraries():
        assert transformers.logging.get_verbosity() == verbosity
