"""Tables and picture are written whole, from results.jsonl alone, and are the same for the same results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from comparison_records import BASE, record

from llava_steering_plugin.comparison.records import FILE, write_records
from llava_steering_plugin.comparison.results.writing import write_results
from llava_steering_plugin.errors import ArgumentsError


@pytest.fixture
def output(tmp_path: Path) -> Path:
    found = [record(tmp_path, BASE, 1, [0, 1, 0, 0]), record(tmp_path, "A", 1, [1, 1, 1, 0], ended="2026-01-02")]
    write_records(tmp_path / FILE, [*found, record(tmp_path, "B", 1, [1, 0, 1, 0])])
    return tmp_path


def test_all_files_are_written_and_a_second_time_the_same(output: Path) -> None:
    files = write_results(output)
    names = ["results.md", "results.csv", "results.json", "results.png", "results.svg"]
    assert [file.name for file in files] == names
    before = [file.read_bytes() for file in files]
    assert [file.read_bytes() for file in write_results(output)] == before
    assert b"](results.png)" in before[0]
    assert sorted(path.name for path in output.iterdir()) == sorted([*names, FILE, "points"])


def test_the_document_says_what_it_is_and_holds_the_summary(output: Path) -> None:
    write_results(output, reference="B")
    document = json.loads((output / "results.json").read_text())
    assert list(document)[:3] == ["measure", "plugin_version", "date"]
    assert (document["measure"], document["date"], document["reference"]) == ("comparison", "2026-01-02", "B")
    method = document["tasks"][0]["methods"][1]
    assert method["outcomes"]["held out"]["difference"]["mean"] == 25.0


def test_without_matplotlib_the_tables_are_written_and_the_extra_is_named(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ArgumentsError, match="pictures need matplotlib: pip install"):
        write_results(output)
    assert "](results.png)" not in (output / "results.md").read_text() and not (output / "results.png").exists()
    assert (output / "results.csv").is_file()


def test_what_is_missing_is_told_and_nothing_is_written(output: Path) -> None:
    (output / "points" / "1.jsonl").unlink()
    with pytest.raises(ArgumentsError, match=r"1\.jsonl cannot be read"):
        write_results(output)
    (output / FILE).unlink()
    with pytest.raises(ArgumentsError, match=r"results\.jsonl cannot be read"):
        write_results(output)
    assert not list(output.glob("results.*"))


def test_a_folder_in_the_place_of_a_table_is_told_and_the_others_stay(output: Path) -> None:
    (output / "results.csv").mkdir()
    (output / "results.md").write_text("before")
    with pytest.raises(ArgumentsError, match="cannot be written"):
        write_results(output)
    assert not list(output.glob(".*partial"))
