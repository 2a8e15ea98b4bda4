"""A user's own questions are scored by exact match to their reference answers: `evaluation/scores/own_data.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.evaluation.benchmark import Wanted
from llava_steering_plugin.evaluation.scores.own_data import read_own


def write(file: Path, *entries: Any) -> Path:
    """Write a list of samples, or lines, as the name of the file says."""
    listed = file.suffix == ".json"
    file.write_text(json.dumps(entries) if listed else "".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def test_llavas_training_data_give_the_first_answer_of_each_sample(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "Red"}]
    more = [{"from": "human", "value": "Shape?"}, {"from": "gpt", "value": "square"}]
    samples = {"id": "one", "conversations": turns + more, "task": "colour"}, {"id": 2, "conversations": turns}
    found = read_own(write(tmp_path / "train.json", *samples), Wanted()).items
    assert found == {"one": {"answers": ["Red"], "group": "colour"}, "2": {"answers": ["Red"], "group": None}}


def test_lines_of_a_question_file_give_their_answer_or_several(tmp_path: Path) -> None:
    lines = (
        {"question_id": 1, "text": "?", "answer": "red", "category": "colour"},
        {"question_id": 2, "text": "?", "answer": ["2", "two"]},
    )
    found = read_own(write(tmp_path / "q.jsonl", *lines), Wanted()).items
    assert found == {"1": {"answers": ["red"], "group": "colour"}, "2": {"answers": ["2", "two"], "group": None}}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"question_id": 1, "text": "?"}, "no 'conversations'"),
        ({"id": 1, "conversations": [{"from": "human", "value": "?"}]}, "sample 1 has no answer"),
        ({"id": 1, "answer": []}, "sample 1 has no answer"),
        ({"id": 1, "answer": 3}, "sample 1 has no answer"),
        ({"id": None, "answer": "red"}, "has no question_id or id"),
        ({"answer": "red"}, "has no question_id or id"),
        (["red"], "is no sample"),
    ],
)
def test_what_is_no_reference_is_told(entry: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_own(write(tmp_path / "train.json", entry), Wanted())


def test_a_folder_and_a_missing_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder\. Give LLaVA's JSON"):
        read_own(tmp_path, Wanted())
    with pytest.raises(DataError, match="cannot be read"):
        read_own(tmp_path / "none.json", Wanted())
