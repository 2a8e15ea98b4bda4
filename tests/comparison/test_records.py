"""results.jsonl is read as it was written, whole, and what is none of ours is refused with every line named."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from llava_steering_plugin.comparison.records import DONE, TEST, Record, Score, read_records, write_records
from llava_steering_plugin.errors import ArgumentsError

RECORD = Record(
    cell="shapes-mores-1a2b",
    task="shapes",
    method="MoReS rank 1",
    settings={"tuning_mode": "mores", "mores_rank": 1},
    learning_rate=0.01,
    seed=3,
    split=TEST,
    status=DONE,
    adapter="cells/shapes-mores-1a2b/adapter",
    trained_parameters=2000,
    train_losses=[[1, 2.5], [2, 2.25]],
    scores={"held out": Score("gqa", 61.5, 200, "cells/a.jsonl", "cells/b.jsonl")},
    step_seconds=0.5,
)


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    other = dataclasses.replace(RECORD, status="failed", error="é\n out of memory", scores={}, git={"dirty": True})
    write_records(tmp_path / "results.jsonl", [RECORD, other])
    assert read_records(tmp_path / "results.jsonl") == [RECORD, other]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


def test_a_loss_that_is_no_number_is_null_and_the_line_stays_json(tmp_path: Path) -> None:
    write_records(tmp_path / "results.jsonl", [dataclasses.replace(RECORD, train_losses=[[1, math.nan]])])
    assert read_records(tmp_path / "results.jsonl")[0].train_losses == [[1, None]]
    assert "NaN" not in (tmp_path / "results.jsonl").read_text()


def test_a_key_of_a_later_version_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps({**RECORD.as_json(), "colour": "blue"}) + "\n")
    assert read_records(tmp_path / "results.jsonl") == [RECORD]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"split": "train"}, "split is 'train', not one of validation, test"),
        ({"status": "running"}, "status is 'running'"),
        ({"seed": True}, "seed is True"),
        ({"learning_rate": "0.1"}, "learning_rate is '0.1'"),
        ({"scores": {"held out": {"benchmark": "gqa"}}}, "scores.held out.score is missing"),
        ({"scores": {"held out": 3}}, "scores.held out is no object"),
    ],
)
def test_what_is_wrong_with_a_line_is_named(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(RECORD.as_json()) + "\n" + json.dumps({**RECORD.as_json(), **changed}) + "\n")
    with pytest.raises(ArgumentsError) as error:
        read_records(file)
    assert f"line 2: {said}" in str(error.value)


@pytest.mark.parametrize("content", [b"{}\n[]\n", b"not json\n", b"\xff\xfe", b"3\n"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "results.jsonl").write_bytes(content)
    with pytest.raises(ArgumentsError, match=r"results\.jsonl"):
        read_records(tmp_path / "results.jsonl")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentsError, match="cannot be read"):
        read_records(tmp_path / "results.jsonl")


def test_what_was_there_before_stays_where_nothing_can_be_written(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    write_records(file, [RECORD])
    with pytest.raises(TypeError):
        write_records(file, [dataclasses.replace(RECORD, settings={"mode": object()})])
    assert read_records(file) == [RECORD]
