"""A layout that differs is told with the file that was expected: `evaluation/official_files.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_folders import SCORED, make

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.evaluation.benchmark import Wanted
from llava_steering_plugin.evaluation.official_files import keyed, official, read_json, read_lines
from llava_steering_plugin.evaluation.registry import BENCHMARKS


def test_a_folder_stands_for_the_official_file_in_it(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "val.json").write_text("[]")
    assert official(tmp_path, "val.json", "b/val.json") == tmp_path / "b" / "val.json"
    assert official(tmp_path / "b" / "val.json", "other.json") == tmp_path / "b" / "val.json"
    with pytest.raises(DataError, match=r"holds no a\.json or c\.json\. Is it the official folder"):
        official(tmp_path, "a.json", "c.json")
    with pytest.raises(DataError, match=r"there is no .*none\. Give a\.json"):
        official(tmp_path / "none", "a.json")


CONTENTS = [
    "",
    "[",
    "null",
    "[1]",
    '{"a": 1}',
    '{"annotations": [{}], "data": [3], "images": [4]}',
    "\x00",
    "[" * 10**5,
]


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_other_content_is_refused_in_one_message_that_names_a_file(content: str, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text(content)
    for benchmark in BENCHMARKS.values():
        with pytest.raises(DataError, match=str(tmp_path)):
            benchmark.read(file, Wanted())


@pytest.mark.parametrize("task", SCORED)
def test_no_damage_to_a_file_of_the_official_layout_ends_in_another_error(task: str, tmp_path: Path) -> None:
    case = make(task, tmp_path / "official")
    whole = {file: file.read_bytes() for file in (tmp_path / "official").rglob("*") if file.is_file()}
    refused = 0
    for file, content in whole.items():
        for damaged in (
            content[: len(content) // 2],
            content.replace(b'"', b"'", 1),
            content.replace(b":", b",", 2),
            b"",
        ):
            file.write_bytes(damaged)
            try:
                BENCHMARKS[task].read(case.annotations, Wanted())
            except DataError as error:
                refused += 1
                assert str(tmp_path) in str(error)
        file.write_bytes(content)
    assert refused
    assert BENCHMARKS[task].read(case.annotations, Wanted()).items


def test_an_empty_folder_is_told_for_every_benchmark(tmp_path: Path) -> None:
    for benchmark in BENCHMARKS.values():
        with pytest.raises(DataError, match="holds no"):
            benchmark.read(tmp_path, Wanted())
        with pytest.raises(DataError, match="none"):
            benchmark.read(tmp_path / "none", Wanted())


def test_lines_and_keys_are_named(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text('{"a": 1}\n\n[2]\n')
    with pytest.raises(
        DataError, match=r"lines\.jsonl is in another layout than the official one: line 3 is no object"
    ):
        read_lines(file)
    file.write_text(json.dumps([1]))
    with pytest.raises(DataError, match="it should hold a list of pets"):
        read_json(file, dict, "a list of pets")
    with pytest.raises(DataError, match="holds question 5 twice"):
        keyed(file, [(5, "a"), ("5", "b")])
