"""The section of each measure holds its numbers, also where some are missing, and for one model as for twenty.

Modules: diagnostics/report/modality.py, diagnostics/report/interference.py, diagnostics/report/steering.py,
diagnostics/report/during.py, diagnostics/report/training.py, diagnostics/report/look.py,
diagnostics/report/lines.py, diagnostics/report/maps.py.
Also, in the tests of their measures: diagnostics/report/routing.py, diagnostics/report/points.py,
diagnostics/report/image.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from reports import interference_of, modality_of, reported, write_result

from llava_steering_plugin.diagnostics.report.lines import Line, draw_lines
from llava_steering_plugin.errors import ArgumentsError

MEANS = {"mean": 0.1, "layers": [0.1, 0.1]}


def test_attention_ratios_and_what_they_average_to(tmp_path: Path) -> None:
    write_result(tmp_path / "modality.json", modality_of({"base": [0.25, 0.5], "mores": [0.5, 1.5]}))
    page = reported(tmp_path / "report.html", tmp_path)
    assert page.traces("attention ratio")["mores"]["y"] == [0.5, 1.5]
    assert page.traces("share of the attention")["base"]["y"] == [0.025, 0.05]
    assert "base gives an image token 0.375 times the attention of a text token (layers: 0.25 to 0.5" in page.text
    assert "Of all its attention, 0.0375 goes to the image. The interval lies below 1 in 2 of 2 layers" in page.text
    assert "The interval lies below 1 in 1 of 2 layers, and above 1 in 1." in page.text
    assert "0.5 (0.45 to 0.55)" in page.text
    heads = page.maps()
    assert [trace["z"] for trace in heads] == [[[-2, -2], [-1, -1]], [[-1, -1], [math.log2(1.5)] * 2]]
    assert {(trace["zmin"], trace["zmax"]) for trace in heads} == {(-2, 2)}
    ratios = [layout["yaxis"] for _, layout in page.figures if layout["yaxis"].get("type") == "log"]
    assert len(ratios) == 4
    assert len({tuple(axis["range"]) for axis in ratios}) == 1


@pytest.mark.parametrize("hole", [None, math.nan])
def test_missing_numbers_are_gaps(hole: float | None, tmp_path: Path) -> None:
    document = modality_of({"one": [0.5, hole, 0.25], "none": [hole], "single": [0.5]})
    document["models"][2]["lmar"]["all text"] |= {"low": [None], "high": [None]}
    document["models"].append({**document["models"][1], "name": "empty", "lmar_by_head": []})
    for values in (*document["models"][3]["lmar"].values(), *document["models"][3]["shares"].values()):
        values.update(mean=[], low=[], high=[])
    write_result(tmp_path / "modality.json", document)
    page = reported(tmp_path / "report.html", tmp_path)
    assert page.traces("attention ratio")["one"]["y"] == [0.5, None, 0.25]
    assert "Of none, no answer could be measured." in page.text
    assert "Of empty, no answer could be measured." in page.text
    assert "NaN" not in page.text
    assert "gives an image token 0.375 times" in page.text


def test_twenty_models_with_long_names(tmp_path: Path) -> None:
    names = [f"{'a-long-name' * 5}-{number}" for number in range(20)]
    write_result(tmp_path / "modality.json", modality_of({name: [0.5] for name in names}))
    page = reported(tmp_path / "report.html", tmp_path)
    lines = page.traces("attention ratio")
    assert len(lines) == 20
    looks = {(line["line"]["color"], line["line"]["dash"], line["marker"]["symbol"]) for line in lines.values()}
    assert len(looks) == 20
    assert all(name in page.text for name in names)
    assert "in 20 models" in page.text


def test_interference_maps_have_one_scale_and_the_numbers_of_all_kinds(tmp_path: Path) -> None:
    matrix = [[1.0, -0.4, 0.2], [0.1, 1.0, None], [1.7, 0.3, 1.0]]
    write_result(tmp_path / "interference.json", interference_of(["vqa", "ocr", "text"], {"mixlora": matrix}))
    page = reported(tmp_path / "report.html", tmp_path)
    maps = page.maps()
    assert [trace["z"] for trace in maps] == [matrix] * 3
    assert {(trace["zmin"], trace["zmax"]) for trace in maps} == {(-1, 1)}
    assert maps[0]["text"][0] == ["1.00", "-0.40", "0.20"]
    assert "different tasks is 0.38; 1 of 5 are negative. The lowest is -0.4: a step for ocr, on the loss of vqa." in (
        page.text
    )
    by_layer = page.traces("interference")
    assert by_layer.keys() == {"mixlora, factors A", "mixlora, factors B"}
    assert by_layer["mixlora, factors A"]["y"] == pytest.approx([0.38, 0.38])
    assert "factors A vqa ocr -0.4 -0.4 -0.4" in page.text


def test_the_course_of_trainings(tmp_path: Path) -> None:
    from transformers.trainer_callback import TrainerState

    for name, factor in (("mores", 1.0), ("lora", 2.0)):
        log = [{"step": step, "epoch": step / 3, "loss": factor / step, "learning_rate": 1e-3} for step in (1, 2, 3)]
        log += [{"step": 3, "eval_loss": math.nan, "eval_runtime": 2.0}, {"step": 3, "train_loss": 1.0}]
        folder = tmp_path / name
        for place in (folder, folder / "checkpoint-2"):
            place.mkdir()
            TrainerState(log_history=log, global_step=3, max_steps=3).save_to_json(str(place / "trainer_state.json"))
    page = reported(tmp_path / "report.html", tmp_path)
    assert {name: line["y"] for name, line in page.traces("loss").items()} == {
        "lora": [2.0, 1.0, pytest.approx(2 / 3)],
        "mores": [1.0, 0.5, pytest.approx(1 / 3)],
    }
    assert page.traces("validation loss")["lora"]["y"] == [None]
    assert "The loss of mores was 1 at step 1 and 0.333 at step 3; the lowest was 0.333 at step 3." in page.text
    assert "runtime" not in page.text


def test_what_was_measured_during_trainings(tmp_path: Path) -> None:
    header: dict[str, Any] = {"format": 1, "mode": "mores", "layers": 2, "every": 2, "samples": [{"number": 3}]}
    for day, (name, last) in enumerate((("one", 0.5), ("two", None)), 1):
        header |= {"plugin_version": "9.8.7", "date": f"2026-01-0{day}T03:04:05+00:00"}
        passes = [
            {"step": 0, "lmar": {"mean": 0.25, "layers": [0.2, 0.3]}},
            {
                "step": 2,
                "lmar": {"mean": last, "layers": [last, None]},
                "update_norms": {"vis": {**MEANS, "tokens": 4}},
            },
        ]
        lines = [json.dumps(line) for line in (header, *passes)]
        (tmp_path / name).mkdir()
        # A training is writing the last line.
        (tmp_path / name / "diagnostics.jsonl").write_text("\n".join([*lines, '{"step": 4, "lm']))
    page = reported(tmp_path / "report.html", tmp_path)
    assert {name: line["y"] for name, line in page.traces("attention ratio").items()} == {
        "one": [0.25, 0.5],
        "two": [0.25, None],
    }
    assert "Attention ratio of one, the mean over layers: 0.25 at step 0, 0.5 at step 2." in page.text
    assert "version of llava-steering-plugin 9.8.7 9.8.7" in " ".join(page.text.split())
    assert "measured with different settings" not in page.text
    by_layer = [data for data, layout in page.figures if layout["xaxis"]["title"]["text"] == "decoder layer"]
    assert {trace["name"]: trace["y"] for trace in by_layer[0]}["two, step 2"] == [None, None]

    newer = tmp_path / "one" / "diagnostics.jsonl"
    newer.write_text(newer.read_text().replace('"format": 1', '"format": 2'))
    (tmp_path / "two" / "diagnostics.jsonl").write_text("[]\n")
    with pytest.raises(
        ArgumentsError, match=r"(?s)two/diagnostics.jsonl is damaged.*it is of format 2, and 1 is known"
    ):
        reported(tmp_path / "report.html", tmp_path)


def test_an_interval_has_a_band_for_each_stretch_that_has_one() -> None:
    line = Line("x", range(4), [1, 2, 3, 4], [1, None, 2, 3], [2, 3, 4, 5])
    bands = [json.loads(trace.to_plotly_json()["x"].__repr__()) for trace in draw_lines([line], "x", "y").data[:-1]]
    assert bands == [[0, 0, 0], [2, 3, 3, 2, 2]]
