"""results.md says what was reached, with how many seeds, and names what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparison_records import BASE, record

from llava_steering_plugin.comparison.records import DIVERGED, FAILED, VALIDATION, Record
from llava_steering_plugin.comparison.results.markdown import byte_count, markdown, table
from llava_steering_plugin.comparison.results.summarising import summarise


def rows_of(text: str) -> dict[str, list[list[str]]]:
    """Return the rows of all tables, by their first cells."""
    found: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        if line.startswith("| "):
            first, *others = (cell.strip() for cell in line.strip("|").replace("\\|", "/").split("|"))
            found.setdefault(first, []).append(others)
    return found


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    measured = {"projector_parameters": 500, "file_bytes": 6_100_000, "step_seconds": 0.25, "step_ratio": 3.0}
    measured |= {"answer_seconds": 0.012, "answer_ratio": 1.04, "peak_bytes": 2_500_000_000}
    return [
        record(tmp_path, BASE, 1, [0, 0, 0, 1], answer_seconds=0.01, answer_ratio=1.0),
        record(tmp_path, "A", 1, [1, 1, 0, 0], **measured),
        record(tmp_path, "A", 2, [1, 1, 1, 0], **measured),
        record(tmp_path, "B|b", 1, [1, 0, 0, 0]),
        record(tmp_path, "B|b", 2, status=FAILED, error="no memory | " + "x" * 300),
        record(tmp_path, "A", 1, [1, 0], split=VALIDATION),
        record(tmp_path, "A", 2, [1, 1], split=VALIDATION),
        record(tmp_path, "A", 1, [1, 1], split=VALIDATION, rate=0.1),
        record(tmp_path, "A", 2, split=VALIDATION, rate=0.1, status=DIVERGED),
    ]


def test_scores_have_their_spread_and_seeds_and_differences_their_interval(
    records: list[Record], tmp_path: Path
) -> None:
    text = markdown(summarise(records, tmp_path))
    rows = rows_of(text)
    assert rows["method"][0] == ["learning rate", "seeds", "held out", "\N{MINUS SIGN} A"]
    assert rows["A"][0] == ["0.01", "2", "62.5 ± 17.7", "reference"]
    rate, seeds, score, difference = rows["B/b"][0]
    assert (rate, seeds, score) == ("0.01", "1 of 2", "25.0")
    assert difference.startswith("\N{MINUS SIGN}25.0 [\N{MINUS SIGN}75.0, ")
    assert rows[BASE][0][:3] == ["\N{EN DASH}", "\N{EN DASH}", "25.0"]
    assert "Tests: held out (exact_match, 4 questions)." in text


def test_costs_stand_with_and_without_the_projector(records: list[Record], tmp_path: Path) -> None:
    rows = rows_of(markdown(summarise(records, tmp_path)))
    assert rows["A"][1] == ["1,000", "1,500", "6.1 MB", "3.00 x (0.25 s)", "1.04 x (0.012 s)", "2.5 GB"]
    assert rows[BASE][1][3:5] == ["\N{EN DASH}", "1.00 x (0.01 s)"]


def test_validation_has_every_rate_and_the_chosen_one_is_bold(records: list[Record], tmp_path: Path) -> None:
    rows = rows_of(markdown(summarise(records, tmp_path)))
    assert rows["held out"][-1] == ["0.01", "0.1"]
    assert rows["A"][2] == ["**75.0 ± 35.4**", "100.0 (1 diverged of 2)"]


def test_what_has_no_result_is_named_with_its_reason(records: list[Record], tmp_path: Path) -> None:
    text = markdown(summarise(records, tmp_path))
    assert "**2 of 7 cells have no result**" in text and "## Cells without a result" in text
    lines = [line for line in text.splitlines() if line.startswith("| colours |")]
    assert [line.split(" | ")[1:5] for line in lines] == [
        ["B\\|b", "0.01", "2", "failed (test)"],
        ["A", "0.1", "2", "diverged (validation)"],
    ]
    assert "no memory \\| xxx" in lines[0] and lines[0].endswith("x ... |") and len(lines[0]) < 300


def test_the_picture_stands_in_it_and_how_to_read_it(records: list[Record], tmp_path: Path) -> None:
    summary = summarise(records, tmp_path)
    assert "](results.png)" in markdown(summary, "results.png") and "](" not in markdown(
        summarise(records[:2], tmp_path)
    )
    assert "2,000 times, seeds and questions are drawn with replacement" in markdown(summary)


def test_every_row_of_a_table_has_as_many_cells_as_its_heading(records: list[Record], tmp_path: Path) -> None:
    tables = [part for part in markdown(summarise(records, tmp_path)).split("\n\n") if part.startswith("|")]
    assert len(tables) == 4
    for part in tables:
        assert len({line.replace("\\|", "").count("|") for line in part.splitlines()}) == 1


def test_cells_of_a_table_are_one_line() -> None:
    assert table(["a", "b"], [["x\ny|", "1"]]) == "| a | b |\n| --- | ---: |\n| x y\\| | 1 |"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "–"), (None, "–"), (999, "999 B"), (1028, "1.03 kB"), (3_210_000_000_000, "3.21e+03 GB")]
)
def test_bytes_are_given_in_the_largest_unit(count: int | None, text: str) -> None:
    assert byte_count(count) == text
