"""`diagnose modality` measures what LLaVA can be asked: tiles, packed bases, unequal batches; it says what it left out.

Modules: diagnostics/modality/one_model.py, diagnostics/positions.py, diagnostics/modality/summary.py,
cli/diagnose/modality.py, diagnostics/pictures/heat_maps.py, diagnostics/intervals.py.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diagnosing import diagnosed
from own_parts import ANYRES
from PIL import Image
from quantising import quantising_on_cpu
from scipy import stats
from steered import load_llava
from tiny_llava import VISUAL_TOKENS, TinyLlava

from llava_steering_plugin.diagnostics.intervals import RESAMPLES
from llava_steering_plugin.diagnostics.modality.summary import modality_rows, notes_on, summarise_model
from llava_steering_plugin.diagnostics.records import Records, open_records
from llava_steering_plugin.diagnostics.results import write_tables
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.measures.modality import Kind

SHORT = ("--max-new-tokens", "4")


def asked(tiny: TinyLlava) -> list[dict[str, Any]]:
    return [json.loads(line) for line in tiny.questions.read_text().splitlines()]


def kept(output: Path) -> list[dict[str, Any]]:
    """The measurements of the one model of a run, as they are on the disk."""
    (file,) = (output / "modality").glob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()[1:]]


def checkpoint(tiny: TinyLlava, folder: Path, **settings: Any) -> Path:
    """The tiny LLaVA with another config, as a checkpoint."""
    shutil.copytree(tiny.llava, folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | settings))
    return folder


@pytest.mark.parametrize("tokens", ["1", "4"])
def test_batches_of_unequal_questions_give_what_each_gives_alone(
    tokens: str, tiny: TinyLlava, patched_llava: Path, tmp_path: Path
) -> None:
    questions = tmp_path / "questions.jsonl"
    longer = [each | {"text": each["text"] + " Say why." * number} for number, each in enumerate(asked(tiny)[:3])]
    longer[1] |= {"image": ["00.png", "01.png"]}
    questions.write_text("".join(json.dumps(each) + "\n" for each in longer))
    found = []
    for size in ("1", "3"):
        output = tmp_path / size
        words = (
            "--question-file",
            str(questions),
            "--max-new-tokens",
            tokens,
            "--batch-size",
            size,
            "--samples",
            "100",
        )
        (model,) = diagnosed("modality", tiny, output, str(tiny.llava), *words)["models"]
        assert model["answers"] == 3
        found.append(kept(output))
    for alone, together in zip(*found, strict=True):
        if tokens != "1" and alone["answer"] != together["answer"]:
            # Half precision on a processor without AVX-512. The first token's shares do not depend on what it is.
            assert torch.backends.cpu.get_cpu_capability() != "AVX512"
            continue
        assert alone["counts"] == together["counts"]
        assert alone["counts"]["image"] == VISUAL_TOKENS * (2 if alone["question_id"] == 1 else 1)
        for kind, shares in alone["shares"].items():  # the model computes in half precision
            torch.testing.assert_close(torch.tensor(together["shares"][kind]), torch.tensor(shares), rtol=0, atol=2e-3)


def test_an_image_in_tiles_counts_with_all_of_them(tiny: TinyLlava, patched_llava: Path, tmp_path: Path) -> None:
    tiled = load_llava(tiny.llava, **ANYRES)
    tiled.model.image_newline.data = torch.randn(tiled.config.hidden_size, generator=torch.Generator().manual_seed(0))
    folder = tmp_path / "llava-v1.6-tiny"
    tiled.half().save_pretrained(folder)
    for file in tiny.llava.glob("token*"):
        shutil.copy(file, folder)
    one, other = asked(tiny)[:2]
    both = one | {"question_id": "both", "image": [one["image"], other["image"]]}
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text("".join(json.dumps(each) + "\n" for each in [*asked(tiny), both]))
    answers.write_text("".join(json.dumps(each | {"text": "red"}) + "\n" for each in [*asked(tiny), both]))

    counts = []
    for number, words in enumerate((SHORT, ("--answers-file", str(answers)))):
        output = tmp_path / str(number)
        diagnosed("modality", tiny, output, str(folder), "--question-file", str(questions), *words)
        counts.append({row["question_id"]: row["counts"]["image"] for row in kept(output)})
    # The whole image, and two tiles with a newline after each row of patches, without what only pads them.
    assert counts[0] == counts[1]
    assert all(count > 2 * VISUAL_TOKENS for count in counts[0].values())
    assert len(set(counts[0].values())) > 1
    assert counts[0]["both"] == counts[0][one["question_id"]] + counts[0][other["question_id"]]


def test_a_base_in_four_bits(tiny: TinyLlava, patched_llava: Path, tmp_path: Path) -> None:
    words = (str(tiny.llava), "--question-file", str(tiny.questions), *SHORT, "--samples", "2")
    (whole,) = diagnosed("modality", tiny, tmp_path / "16", *words)["models"]
    with quantising_on_cpu():
        found = diagnosed("modality", tiny, tmp_path / "4", *words, "--load-4bit")
    (packed,) = found["models"]
    assert found["settings"]["load_4bit"]
    assert packed["answers"] == 2
    total = numpy.sum([each["mean"] for each in packed["shares"].values()], 0)
    assert total == pytest.approx([1] * 4, abs=1e-4)
    ratios = [model["lmar"]["all text"]["mean"] for model in (packed, whole)]
    assert ratios[0] != ratios[1]
    assert ratios[0] == pytest.approx(ratios[1], rel=0.3)


def test_questions_that_are_too_long_are_left_out_counted_and_named_on_standard_error(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tiny, tmp_path / "llava-v1.5-short", tokenizer_model_max_length=130)
    first, second, third = asked(tiny)[:3]
    questions = tmp_path / "questions.jsonl"
    rows = [first, second | {"text": "Why? " * 60}, {"question_id": "text", "text": "Why?"}, third]
    questions.write_text("".join(json.dumps(each) + "\n" for each in rows))
    words = (str(folder), "--question-file", str(questions), *SHORT)
    (model,) = diagnosed("modality", tiny, tmp_path / "out", *words)["models"]
    assert model["answers"] == 2
    reason = "longer than the model's context"
    assert model["left_out"] == {"about no image": 1, reason: 1}
    assert f"llava-v1.5-short: 2 measured; left out: 1 (about no image), 1 ({reason})" in capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "out" / "modality.csv").open()))
    assert {row["of"]: row["mean"] for row in rows if row["quantity"] == "left out"} == {
        "about no image": "1",
        reason: "1",
    }
    (cut,) = (row for row in kept(tmp_path / "out") if "left_out" in row)
    assert "the model reads 130" in cut["details"]


def test_heads_are_shown_on_demand_without_measuring_again(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path
) -> None:
    words = (str(tiny.llava), "--question-file", str(tiny.questions), *SHORT)
    plain = diagnosed("modality", tiny, tmp_path, *words)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "modality").iterdir()}
    found = diagnosed("modality", tiny, tmp_path, *words, "--per-head")
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "modality").iterdir()}

    model = found["models"][0]
    assert plain["models"][0] == {key: value for key, value in model.items() if key != "per_head"}
    heads = model["per_head"]
    assert heads["lmar"]["all text"]["mean"] == model["lmar_by_head"]
    for kind, values in heads["shares"].items():
        low, mean, high = (numpy.array(values[each]) for each in ("low", "mean", "high"))
        assert mean.shape == (4, 4)
        assert (low <= mean).all()
        assert (mean <= high).all()
        assert mean.mean(1) == pytest.approx(model["shares"][kind]["mean"], abs=1e-5)

    rows = list(csv.DictReader((tmp_path / "modality.csv").open()))
    (row,) = (row for row in rows if (row["layer"], row["head"], row["of"]) == ("2", "3", "image"))
    assert float(row["low"]) == heads["shares"]["image"]["low"][2][3]
    with Image.open(tmp_path / "modality-heads.png") as picture:
        assert picture.width > 600


def records_of(count: int, folder: Path) -> Records:
    """Random measurements of two layers with three heads."""
    draw = numpy.random.default_rng(0)
    records = Records(folder / "records.jsonl", {})
    for number in range(count):
        shares = draw.dirichlet([1] * len(Kind), (2, 3))
        names = [kind.name.lower() for kind in Kind]
        records.add(
            {
                "question_id": number,
                "queries": 2,
                "counts": dict.fromkeys(names, 3) | {"image": 16},
                "shares": {name: shares[..., place].tolist() for place, name in enumerate(names)},
            }
        )
    return records


def test_measurements_of_other_settings_are_named_for_all_models_at_once(tmp_path: Path) -> None:
    models = {"one": "base/one", "other": "base/other"}
    asked = {"questions": "0" * 64, "samples": 3}
    open_records(tmp_path, asked, models, None)
    with pytest.raises(ArgumentsError) as refused:
        open_records(tmp_path, asked | {"questions": "1" * 64, "samples": 4}, models, None)
    said = str(refused.value)
    for name in models:
        assert f"{name}.jsonl holds measurements of other settings" in said
    assert said.count("questions: the files have other contents now") == said.count("samples: 3 there, 4 now") == 2


def test_a_result_is_json_whatever_was_measured(tmp_path: Path) -> None:
    """JSON has no word for infinity, and other programs than Python's refuse it."""
    written, _ = write_tables({"a": [math.inf, {"b": (math.nan, 1.5)}]}, [], tmp_path / "result")
    found = json.loads(written.read_text(), parse_constant=pytest.fail)
    assert found["a"] == [None, {"b": [None, 1.5]}]


def test_means_and_intervals_are_those_of_the_answers(tmp_path: Path) -> None:
    records = records_of(30, tmp_path)
    model = summarise_model("model", {}, records, 0, per_head=True)
    image = numpy.array([row["shares"]["image"] for row in records])
    expected = stats.bootstrap(
        (image[:, 1, 2],), numpy.mean, n_resamples=RESAMPLES, method="percentile", random_state=1
    ).confidence_interval
    found = model["per_head"]["shares"]["image"]
    assert found["mean"][1][2] == pytest.approx(image[:, 1, 2].mean(), rel=1e-5)
    assert found["low"][1][2] == pytest.approx(expected.low, abs=0.01)
    assert found["high"][1][2] == pytest.approx(expected.high, abs=0.01)
    assert model["shares"]["image"]["mean"] == pytest.approx(image.mean((0, 2)), rel=1e-5)
    assert len(list(modality_rows([model]))) == 1 + 9 * 2 + 9 * 2 * 3 + 1
    assert notes_on([model]) == []


def test_one_answer_has_no_interval_and_none_has_no_numbers(tmp_path: Path) -> None:
    one = summarise_model("one", {}, records_of(1, tmp_path), 0, per_head=True)
    assert one["per_head"]["lmar"]["all text"]["low"] == [[None] * 3] * 2
    none = summarise_model("none", {}, [{"question_id": 1, "left_out": "no answer"}], 2, per_head=True)
    assert (none["answers"], none["lmar_by_head"], none["lmar"]["all text"]["mean"]) == (0, [], [])
    assert notes_on([none]) == ["none: 0 measured; left out: 2 (about no image), 1 (no answer)"]
