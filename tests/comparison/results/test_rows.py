"""results.csv has a row for each test at the chosen rate, and for each validation test at every rate."""

from __future__ import annotations

import csv
from pathlib import Path

from comparison_records import BASE, record

from llava_steering_plugin.comparison.records import DIVERGED, VALIDATION
from llava_steering_plugin.comparison.results.rows import COLUMNS, csv_text
from llava_steering_plugin.comparison.results.summarising import summarise


def test_the_rows_hold_what_the_summary_holds(tmp_path: Path) -> None:
    records = [
        record(tmp_path, BASE, 1, [0, 1]),
        record(tmp_path, "A, first", 1, [1, 1], projector_parameters=5),
        record(tmp_path, "B", 1, [1, 0]),
        record(tmp_path, "B", 1, [1, 0], split=VALIDATION, eval_loss=0.5),
        record(tmp_path, "B", 1, split=VALIDATION, rate=0.1, status=DIVERGED),
    ]
    summary = summarise(records, tmp_path)
    rows = list(csv.DictReader(csv_text(summary).splitlines()))
    assert tuple(rows[0]) == COLUMNS
    assert [(row["split"], row["method"], row["test"], row["learning_rate"]) for row in rows] == [
        ("test", BASE, "held out", ""),
        ("test", "A, first", "held out", "0.01"),
        ("test", "B", "held out", "0.01"),
        ("validation", "B", "held out", "0.01"),
        ("validation", "B", "eval_loss", "0.01"),
        ("validation", "B", "held out", "0.1"),
    ]
    base, first, other, chosen, loss, lost = rows
    assert (first["mean"], first["deviation"], first["difference"]) == ("100.0", "", "")
    assert (first["trained_parameters"], first["projector_parameters"]) == ("1000", "5")
    assert (other["difference"], other["reference"], other["paired_questions"]) == ("-50.0", "A, first", "2")
    assert float(other["low"]) <= -50 <= float(other["high"]) and other["difference_of"] == "score"
    assert (base["chosen"], chosen["chosen"], lost["chosen"]) == ("False", "True", "False")
    assert (lost["mean"], lost["diverged"], lost["done"], loss["mean"]) == ("", "1", "0", "0.5")
