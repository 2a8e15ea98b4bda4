"""A report is one page that holds the numbers of its results, and loads nothing; bad input is refused in one message.

Modules: diagnostics/report/page.py, diagnostics/report/search.py, diagnostics/report/registry.py,
diagnostics/report/parts.py, cli/report.py.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
from disks import largest_file, open_to_all, without_privileges
from reports import interference_of, modality_of, read_page, reported, write_result

from llava_steering_plugin import __version__
from llava_steering_plugin.diagnostics.report.parts import number, short_names, written
from llava_steering_plugin.errors import ArgumentsError

MODALITY = modality_of({"base": [0.25, 0.5], "mores": [0.5, 1.5]})


@pytest.fixture
def result(tmp_path: Path) -> Path:
    return write_result(tmp_path / "run" / "diagnosis" / "modality.json", MODALITY)


def test_a_page_names_its_settings_and_loads_nothing(result: Path, tmp_path: Path) -> None:
    page = reported(tmp_path / "pages" / "report.html", tmp_path / "run", words=["--title", "A & B"])
    assert page.loads == []
    assert page.tags["script"] == len(page.figures) + 1
    assert "default-src 'none'" in page.html
    assert '"modeBarButtons": [["toImage"' in page.html  # plotly's own list has one that uploads a figure
    assert page.html.count("http-equiv") == 1 and page.tags.keys().isdisjoint({"iframe", "object", "embed", "form"})
    assert page.tags["h1"] == 1 and page.tags["figure"] == len(page.figures) > 2
    assert page.html.count('role="group" aria-label=') == len(page.figures)
    for words in ("A & B", "0eace8", "2026-01-02T03:04:05+00:00", "/models/mores", str(result / "modality.json")):
        assert words in page.text, words
    for heading in ("What came out", "What it does not say", "Models and settings", "The numbers"):
        assert heading in page.text
    assert list(tmp_path.glob("pages/*")) == [tmp_path / "pages" / "report.html"]


def test_the_same_results_give_the_same_bytes_in_place_of_an_older_page(result: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    output.write_text("an older page")
    first = reported(output, result).html
    assert reported(output, result / "modality.json").html == first


def test_runs_of_one_measure_stand_in_one_figure_and_a_folder_is_found_once(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    write_result(runs / "one" / "diagnosis" / "modality.json", MODALITY)
    write_result(runs / "two" / "diagnosis" / "modality.json", modality_of({"base": [2.0]}, seed=3))
    write_result(runs / "two" / "too" / "deep" / "modality.json", modality_of({"deep": [2.0]}))
    page = reported(tmp_path / "report.html", runs, runs / "one")
    lines = page.traces("attention ratio")
    assert {name: line["y"] for name, line in lines.items()} == {
        "base (one)": [0.25, 0.5],
        "mores": [0.5, 1.5],
        "base (two)": [2.0],
    }
    assert len({line["line"]["color"] for line in lines.values()}) == 3
    assert "measured with different settings (seed)" in page.text


def test_names_of_users_are_text_and_nothing_else(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    names = {hostile: [0.5], '"><img src=http://x/>': [0.5], "%{x}<b>&amp;": [0.5]}
    write_result(tmp_path / "modality.json", modality_of(names, conv_mode=hostile))
    tasks = [f"</script>{hostile}", "b"]
    write_result(tmp_path / "interference.json", interference_of(tasks, {hostile: [[1.0, 0.5], [-0.5, 1.0]]}))
    page = reported(tmp_path / "report.html", tmp_path, words=["--title", f"</title>{hostile}"])
    assert page.loads == []
    assert "img" not in page.tags and "b" not in page.tags
    assert page.tags["script"] == len(page.figures) + 1
    assert page.html.count("<script>alert") == 0
    for name in names:
        assert name in page.text
    drawn = {trace.get("name", "") for data, _ in page.figures for trace in data}
    assert not [name for name in drawn if "<" in name or "%{" in name]
    assert "%\N{ZERO WIDTH SPACE}{x}&lt;b&gt;&amp;amp;" in drawn


def test_a_measure_that_is_not_known_is_named(result: Path, tmp_path: Path) -> None:
    newer = {"settings": {"measure": "telepathy"}, "models": [], "plugin_version": "9.9"}
    write_result(tmp_path / "other" / "telepathy.json", newer)
    write_result(tmp_path / "other" / "config.json", {"hidden_size": 64})
    page = reported(tmp_path / "report.html", tmp_path)
    assert re.search(r"Not drawn.*telepathy, in \S+telepathy.json \(written by version 9.9\)", page.text)
    assert page.figures
    with pytest.raises(ArgumentsError, match=rf"{__version__} can draw none of these: \S+telepathy.json"):
        reported(tmp_path / "report.html", tmp_path / "other")


def test_all_that_is_wrong_is_said_before_a_page_is_written(result: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "modality.json").write_text('{"settings": ')
    write_result(tmp_path / "other" / "modality.json", {**MODALITY, "models": [{"name": "x"}]})
    words = modality_of({"base": [0.5]})
    words["models"][0]["shares"]["image"]["mean"] = ["0.5"]
    write_result(tmp_path / "words" / "modality.json", words)
    write_result(tmp_path / "config.json", {"hidden_size": 64})
    folders = [tmp_path / name for name in ("nowhere", "empty", "damaged", "other", "words", "config.json")]
    with pytest.raises(ArgumentsError) as found:
        reported(result, result, *folders)
    message = str(found.value)
    for expected in (
        "nowhere is neither a folder nor a file",
        "empty holds nothing to draw, nor do the folders in it, 2 deep. Looked for are:",
        "modality.json: llava-steering diagnose modality",
        "damaged/modality.json is damaged (",
        "other/modality.json: no modality result as llava-steering-plugin",
        "(KeyError: 'lmar'); written by version 0.1.0",
        "'0.5' stands where a number is expected",
        "config.json holds no result that can be drawn",
        f"--output {result} is a folder",
    ):
        assert expected in message, message
    assert sorted(path.name for path in result.iterdir()) == ["modality.json"]


def test_an_output_that_cannot_be_written_is_refused(result: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentsError, match="is one of the results to draw"):
        reported(result / "modality.json", result)
    with pytest.raises(ArgumentsError, match=r"report.html cannot be written: Not a directory"):
        reported(result / "modality.json" / "report.html", result)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    open_to_all(tmp_path)
    with without_privileges(), pytest.raises(ArgumentsError, match=r"report.html cannot be written: Permission denied"):
        reported(closed / "deeper" / "report.html", result)
    assert list(closed.iterdir()) == []


def test_a_disk_that_fills_up_leaves_the_older_page(result: Path, tmp_path: Path) -> None:
    output = tmp_path / "pages" / "report.html"
    whole = reported(output, result).html
    with largest_file(1_000_000), pytest.raises(ArgumentsError, match="cannot be written: File too large"):
        reported(output, result)
    assert list(output.parent.iterdir()) == [output]
    assert read_page(output).html == whole


def test_a_missing_package_is_named(result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ArgumentsError, match=r"reports need plotly: .*pip install -e '\.\[diagnostics\]'"):
        reported(tmp_path / "report.html", result)


def test_numbers_and_names_as_they_are_written() -> None:
    assert [number(value) for value in (None, math.nan, math.inf, 2)] == [None, None, None, 2.0]
    with pytest.raises(ValueError, match="True stands where a number"):
        number(True)
    assert [written(value) for value in (None, 0.12345, 1234.5, -0.5)] == ["\N{EN DASH}", "0.123", "1,234", "-0.5"]
    names = short_names(["short", "x" * 40 + "1" * 10, "x" * 40 + "1" * 10, "x" * 40 + "2" * 10])
    assert names[0] == "short" and len(set(names)) == 4
    assert max(map(len, names)) < 30
