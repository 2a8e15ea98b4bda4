"""A checkpoint says by which rule its training orders the samples, and a resumed training keeps to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_steering_plugin.errors import CheckpointError
from llava_steering_plugin.training.data.samples import HASHED, RULES, SUMMED
from llava_steering_plugin.training.saving import notes


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_that_is_written_is_the_one_that_is_read(tmp_path: Path, rule: str) -> None:
    notes.write(tmp_path, rule)
    assert notes.order_of(tmp_path) == rule
    assert notes.problems(tmp_path) == []
    written = json.loads((tmp_path / "steering_state.json").read_text())
    assert written.pop("sha256") and written == {"sample_order": rule}


@pytest.mark.parametrize("gathered", [None, {}, {"layers.0.q_proj.a": [0.1, 1 / 3, 1e-30]}], ids=str)
def test_what_the_mode_has_gathered_comes_back_to_the_bit(tmp_path: Path, gathered: dict[str, Any] | None) -> None:
    notes.write(tmp_path, HASHED, gathered)
    assert notes.gathered_in(tmp_path) == gathered
    assert notes.order_of(tmp_path) == HASHED and notes.problems(tmp_path) == []


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
    "no checksum": b'{"sample_order": "seed+epoch"}',
    "no UTF-8": b"\xff\xfe",
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_notes_are_a_problem_of_the_checkpoint_and_never_taken_for_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / notes.NOTES).write_bytes(content)
    assert notes.problems(tmp_path) == ["steering_state.json is damaged"]
    with pytest.raises(CheckpointError, match="in which order"):
        notes.order_of(tmp_path)


@pytest.mark.parametrize("place", [3, 20, 45, -20])
def test_a_flipped_bit_is_noticed(tmp_path: Path, place: int) -> None:
    notes.write(tmp_path, HASHED, {"a": [0.25, 0.75]})
    content = bytearray((tmp_path / notes.NOTES).read_bytes())
    content[place] ^= 1
    (tmp_path / notes.NOTES).write_bytes(content)
    assert notes.problems(tmp_path) == ["steering_state.json is damaged"]
