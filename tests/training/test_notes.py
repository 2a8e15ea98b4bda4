"""A checkpoint says by which rule its training orders the samples, and a resumed training keeps to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_steering_plugin.errors import CheckpointError
from llava_steering_plugin.training import notes
from llava_steering_plugin.training.samples import HASHED, RULES, SUMMED


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_that_is_written_is_the_one_that_is_read(tmp_path: Path, rule: str) -> None:
    notes.write(tmp_path, rule)
    assert notes.order_of(tmp_path) == rule
    assert notes.problems(tmp_path) == []
    assert json.loads((tmp_path / "steering_state.json").read_text()) == {"sample_order": rule}


def test_a_checkpoint_of_an_earlier_version_has_no_notes_and_the_order_of_that_version(tmp_path: Path) -> None:
    assert notes.problems(tmp_path) == []
    assert notes.order_of(tmp_path) == SUMMED


def test_a_rule_of_a_later_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    notes.write(tmp_path, "blake3")
    assert notes.problems(tmp_path) == [], "the checkpoint itself is whole"
    with pytest.raises(CheckpointError, match=r"'blake3'.*later version wrote it: resume with that one") as refused:
        notes.order_of(tmp_path)
    assert HASHED in str(refused.value) and str(tmp_path) in str(refused.value)


DAMAGED = {
    "empty": b"",
    "cut": b'{"sample_order": "sha2',
    "no key": b"{}",
    "a list": b"[]",
    "no text": b'{"sample_order": 1}',
    "no UTF-8": b"\xff\xfe",
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_notes_are_a_problem_of_the_checkpoint_and_never_taken_for_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / notes.NOTES).write_bytes(content)
    assert notes.problems(tmp_path) == ["steering_state.json is cut short"]
    with pytest.raises(CheckpointError, match="in which order"):
        notes.order_of(tmp_path)
