"""The section on a comparison holds the numbers of its results.json: `diagnostics/report/comparison.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comparison_records import BASE, record
from reports import reported

from llava_steering_plugin.comparison.records import DIVERGED, FILE, VALIDATION, write_records
from llava_steering_plugin.comparison.results.writing import write_results
from llava_steering_plugin.errors import ArgumentsError


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    records = [record(folder, BASE, 1, [0] * 19 + [1], versions={"torch": "2.1"})]
    for seed in (1, 2):
        records.append(record(folder, "MoReS", seed, [1] * 10 + [0] * 10, projector_parameters=24))
        records.append(record(folder, "<b>LoRA", seed, [1] * (9 + seed) + [0] * (11 - seed)))
    records.append(record(folder, "MoReS", 1, [1, 0], split=VALIDATION))
    records.append(record(folder, "IA3", 1, split=VALIDATION, status=DIVERGED, error="the loss became NaN"))
    write_records(folder / FILE, records)
    write_results(folder)
    return folder


def test_scores_differences_and_what_has_no_result_stand_in_the_page(output: Path) -> None:
    page = reported(output.parent / "report.html", output)
    assert page.loads == []
    dots = page.traces("score")
    assert {name: (dot["x"], dot["y"]) for name, dot in dots.items()} == {
        "MoReS": ([1024], [50.0]),
        "&lt;b&gt;LoRA": ([1000], [52.5]),
    }
    assert dots["&lt;b&gt;LoRA"]["error_y"]["array"] == [pytest.approx(2.5 * 2**0.5)]
    ((_, layout),) = page.figures
    assert layout["xaxis"]["type"] == "log" and layout["shapes"][0]["y0"] == 5.0
    for words in (
        "colours, held out: <b>LoRA has the highest mean, 52.5.",
        "Of 2 differences from MoReS, the interval of 1 does not hold 0",
        f"{BASE} -45.0 (",
        "1 of the 6 cells of run have no result; a table names them.",
        "MoReS 0.01 2 of 2 50.0 ± 0.0 reference",
        "<b>LoRA 0.01 2 of 2 52.5 ± 3.5 +2.5 (",
        "colours IA3 0.01 1 diverged the loss became NaN",
        "torch 2.1",
    ):
        assert words in page.text, words


def test_two_comparisons_stand_apart(output: Path) -> None:
    other = output.parent / "other"
    other.mkdir()
    (other / "results.json").write_text((output / "results.json").read_text())
    page = reported(output.parent / "report.html", output.parent)
    assert len(page.figures) == 2
    assert "Scores of colours (other)" in page.text and "Scores of colours (run)" in page.text


def test_a_document_of_another_form_and_results_of_something_else_are_told(output: Path) -> None:
    document = json.loads((output / "results.json").read_text())
    del document["tasks"][0]["methods"][0]["outcomes"]["held out"]
    (output / "results.json").write_text(json.dumps(document))
    with pytest.raises(ArgumentsError, match=r"no comparison result as llava-steering-plugin .* draws them"):
        reported(output.parent / "report.html", output)
    (output / "results.json").write_text('{"rows": []}')
    with pytest.raises(ArgumentsError, match=r"results\.json holds no result that can be drawn"):
        reported(output.parent / "report.html", output / "results.json")


def test_a_comparison_without_a_score_is_drawn_without_a_figure(tmp_path: Path) -> None:
    write_records(tmp_path / FILE, [record(tmp_path, "A", 1, split=VALIDATION, status=DIVERGED)])
    write_results(tmp_path)
    page = reported(tmp_path / "report.html", tmp_path)
    assert page.figures == [] and "1 of the 1 cells" in page.text
