"""Files of single questions' scores are read, and what is none of them is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparison_records import record

from llava_steering_plugin.comparison.results.points import points_of, read_points
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.evaluation.scoring import write_points


def test_what_score_writes_is_read(tmp_path: Path) -> None:
    write_points(tmp_path / "points.jsonl", {"a": 1.0, "é/2": 0.25})
    assert read_points(tmp_path / "points.jsonl") == {"a": 1.0, "é/2": 0.25}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}\n", "question_id"),
        ("", "it is empty"),
        ("nonsense\n", "Expecting value"),
        ('{"question_id": 1, "score": null}\n', "holds no scores of questions"),
        ("[1]\n", "holds no scores of questions"),
        ('{"question_id": 1, "score": 1}\n{"question_id": "1", "score": 0}\n', "question 1 stands there twice"),
    ],
)
def test_a_file_of_something_else_is_told(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "points.jsonl").write_text(text)
    with pytest.raises(ArgumentsError, match=message):
        read_points(tmp_path / "points.jsonl")


def test_all_files_that_cannot_be_read_come_in_one_message(tmp_path: Path) -> None:
    records = [record(tmp_path, "A", seed, [1, 0]) for seed in (1, 2, 3)]
    for number in (0, 2):
        (tmp_path / "points" / f"{number}.jsonl").unlink()
    with pytest.raises(ArgumentsError) as caught:
        points_of(records, tmp_path)
    assert "0.jsonl cannot be read" in str(caught.value) and "2.jsonl cannot be read" in str(caught.value)
    assert points_of(records[1:2], tmp_path) == {(records[1].cell, "held out"): {"0": 1.0, "1": 0.0}}
