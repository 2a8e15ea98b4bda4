"""A run over questions or data measures the steering of MoReS adapters, layer by layer, and goes on where it ended.

Modules: diagnostics/steering/one_model.py, diagnostics/steering/run.py, diagnostics/steering/summary.py,
diagnostics/intervals.py, diagnostics/pictures/steering.py, diagnostics/preflight.py, inference/asking/greedy.py,
cli/diagnose/steering.py.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diagnosing import diagnosed, saved_adapter
from lora_folders import save_lora
from PIL import Image
from reports import reported
from steered import load_llava
from tiny_llava import VISUAL_TOKENS, TinyLlava

from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.diagnostics.intervals import one_with_interval, with_interval
from llava_steering_plugin.diagnostics.steering.one_model import load_bases
from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS

Run = Callable[..., dict[str, Any]]
IDLE = 2  # a layer that steers nothing


def silence(attachment: Attachment) -> None:
    """Lets one layer of an adapter do nothing."""
    for name, parameter in attachment.parameters().items():
        if name.startswith(f"layers.{IDLE}.") and not name.endswith("basis"):
            parameter.data.zero_()


@pytest.fixture(scope="module")
def adapters(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    model = load_llava(tiny.llava)
    both = MoReS(rank=1, tokens="all", modality="vis+text", layers="1-2")
    return {
        "idle": saved_adapter(model, MoReS(rank=2, tokens="all"), root / "idle", tiny, silence),
        "both": saved_adapter(model, both, root / "both", tiny),
        "mixlora": saved_adapter(model, MixLoRA(factors=2, rank=1), root / "mixlora", tiny),
        "lora": save_lora(model, root / "lora", tiny.llava),
    }


@pytest.fixture
def diagnose(tiny: TinyLlava, patched_llava: Path, tmp_path: Path) -> Run:
    """Runs `llava-steering diagnose steering` and returns steering.json."""

    def run(*words: str) -> dict[str, Any]:
        return diagnosed("steering", tiny, tmp_path / "out", *words)

    return run


def test_two_adapters_over_questions(
    diagnose: Run, tiny: TinyLlava, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--question-file", str(tiny.questions), "--max-new-tokens", "4")
    found = diagnose(str(adapters["idle"]), f"other={adapters['both']}", *words, "--samples", "9")
    assert "9 samples are asked for; 6 are about an image." in capsys.readouterr().err
    assert found["settings"]["measure"] == "steering"
    assert found["settings"]["answers"] == "generated"
    idle, both = found["models"]
    assert (idle["name"], idle["kind"], idle["answers"], idle["layers"]) == ("idle", "mores", 6, [0, 1, 2, 3])
    assert (both["name"], both["layers"], list(both["norms"])) == ("other", [1, 2], ["vis", "text"])

    # The layer that does nothing: no update, and nothing is lost without it, to the bit.
    assert idle["norms"]["vis"]["mean"][IDLE] == idle["norms"]["vis"]["spread_tokens"][IDLE] == 0
    assert [idle["cost"][end][IDLE] for end in ("mean", "low", "high")] == [0, 0, 0]
    assert IDLE in idle["no_cost_seen"]
    assert all(idle["norms"]["vis"]["mean"][layer] > 0 and idle["cost"]["mean"][layer] != 0 for layer in (0, 1))
    # Behind the last layer no position sees an image's tokens any more.
    assert idle["norms"]["vis"]["mean"][3] > 0 == idle["cost"]["mean"][3]
    assert idle["norms"]["vis"]["tokens"] == 16

    matrix = torch.tensor(idle["cosines"]["vis"])
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(4))
    bases = load_bases(tmp_path / "out" / "steering" / "idle.safetensors")
    hand = torch.linalg.svdvals(bases[0, "vis"].double() @ bases[1, "vis"].double().T).mean()
    assert matrix[0, 1] == pytest.approx(float(hand), rel=1e-4)
    assert 0 < idle["cosines_by_chance"]["vis"] < 0.5
    (pair,) = found["pairs"]
    assert (pair["models"], pair["modality"], pair["layers"]) == (["idle", "other"], "vis", [1, 2])
    assert [len(cosines) for cosines in pair["principal"]] == [1, 1]

    rows = list(csv.DictReader((tmp_path / "out" / "steering.csv").open()))
    (row,) = [each for each in rows if each["model"] == "idle" and each["quantity"] == "cost" and each["layer"] == "1"]
    assert float(row["mean"]) == idle["cost"]["mean"][1]
    with Image.open(tmp_path / "out" / "steering.png") as picture:
        assert picture.width > 1000
    assert "idle and other" in (tmp_path / "out" / "steering.svg").read_text()

    page = reported(tmp_path / "report.html", tmp_path / "out")
    assert page.traces("added loss")["idle"]["y"] == idle["cost"]["mean"]
    sizes = page.traces("relative size")
    assert sizes["other, text"]["x"] == [1, 2]
    assert sizes["other, text"]["y"] == both["norms"]["text"]["mean"]
    assert page.maps()[0]["z"] == idle["cosines"]["vis"]
    assert page.traces("mean cosine")["idle, other: vis"]["y"] == pair["mean"]
    assert f"layer 0 costs most: {idle['cost']['mean'][0]:.3g}. In {len(idle['no_cost_seen'])} of 4 layers" in page.text


def test_every_image_of_a_question_is_steered(
    diagnose: Run, tiny: TinyLlava, adapters: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"question_id": 1, "text": "Which is red?", "image": ["00.png", "01.png"]}))
    (model,) = diagnose(str(adapters["idle"]), "--question-file", str(file), "--max-new-tokens", "2")["models"]
    assert (model["answers"], model["norms"]["vis"]["tokens"]) == (1, 2 * VISUAL_TOKENS)


def test_an_interrupted_run_over_data_goes_on_and_ends_as_the_whole_one(
    diagnose: Run, tiny: TinyLlava, adapters: dict[str, Path], tmp_path: Path
) -> None:
    words = (str(adapters["idle"]), "--data", str(tiny.data), "--samples", "3")
    whole = diagnose(*words)
    (model,) = whole["models"]
    assert (model["answers"], model["left_out"]) == (3, {"about no image": 4})
    assert whole["settings"]["answers"] == "of the data"
    kept = tmp_path / "out" / "steering" / "idle.jsonl"
    lines = kept.read_bytes().splitlines(keepends=True)
    # The numbers are those of the passes.
    rows = [json.loads(line) for line in lines[1:]]
    by_hand = sum(row["without"]["0"] - row["loss"] for row in rows) / 3
    assert model["cost"]["mean"][0] == pytest.approx(by_hand, rel=1e-5)
    kept.write_bytes(b"".join(lines[:2]) + lines[2][:50])
    assert diagnose(*words) == whole
    assert kept.read_bytes() == b"".join(lines)
    with pytest.raises(ArgumentsError, match=r"(?s)of other settings.*seed: 0 there, 1 now"):
        diagnose(*words, "--seed", "1")


def test_losses_are_those_of_the_model_with_the_given_answers(
    diagnose: Run, tiny: TinyLlava, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The data hold the question and the answer that the two files hold, so both ways measure the same."""
    sample = next(each for each in json.loads(tiny.data.read_text()) if len(each["conversations"]) == 2)
    question, answer = (turn["value"] for turn in sample["conversations"])
    (tmp_path / "data.json").write_text(json.dumps([sample]))
    asked = {"question_id": 7, "image": sample["image"], "text": question.removeprefix("<image>\n")}
    (tmp_path / "q.jsonl").write_text(json.dumps(asked) + "\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"question_id": 7, "text": answer}) + "\n")
    adapter = str(adapters["idle"])
    given = diagnosed(
        *("steering", tiny, tmp_path / "given", adapter, "--question-file", str(tmp_path / "q.jsonl")),
        *("--answers-file", str(tmp_path / "a.jsonl")),
    )["models"][0]
    truth = diagnose(adapter, "--data", str(tmp_path / "data.json"))["models"][0]
    # Questions send their pictures in half precision, as LLaVA's programs do, and data in that of the training.
    assert given["norms"]["vis"]["mean"] == pytest.approx(truth["norms"]["vis"]["mean"], rel=1e-3)
    # The data's answers end with the end-of-sequence token, which the given ones leave out.
    assert given["loss"]["on"]["mean"] == pytest.approx(truth["loss"]["on"]["mean"], rel=0.3)
    assert given["answers"] == truth["answers"] == 1
    assert given["cost"]["low"] == [None] * 4


def test_bad_input_is_refused_in_one_message_before_a_model_loads(
    diagnose: Run, tiny: TinyLlava, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.json"
    text.write_text(json.dumps([each for each in json.loads(tiny.data.read_text()) if "image" not in each]))
    names = ("mixlora", "lora")
    with pytest.raises(SteeringError) as refused:
        diagnose(*(str(adapters[name]) for name in names), str(tiny.llava), "/nowhere", "--data", str(text))
    for part in (
        "is a mixlora adapter, and `diagnose steering` is for mores: use `llava-steering diagnose routing`",
        "is a LoRA (use `llava-steering diagnose interference`",
        "is a base (use `llava-steering diagnose modality`)",
        "/nowhere",
        "no sample of",
    ):
        assert part in str(refused.value)
    with pytest.raises(SteeringError, match="either --question-file or --data"):
        diagnose(str(adapters["idle"]))
    with pytest.raises(SteeringError, match="--data holds its own answers"):
        diagnose(str(adapters["idle"]), "--data", str(tiny.data), "--answers-file", str(tiny.questions))
    monkeypatch.setattr("llava_steering_plugin.diagnostics.preflight.find_spec", lambda name: None)
    with pytest.raises(SteeringError, match=r"(?s)matplotlib and scipy: pip install -e '\.\[diagnostics\]'.*no sample"):
        diagnose(str(adapters["idle"]), "--data", str(text))


def test_adapters_of_two_bases_are_not_compared(
    diagnose: Run, tiny: TinyLlava, adapters: dict[str, Path], tmp_path: Path
) -> None:
    model = load_llava(tiny.llava)
    with torch.no_grad():
        model.get_input_embeddings().weight.neg_()
    other = saved_adapter(model, MoReS(rank=1), tmp_path / "other", tiny)
    with pytest.raises(SteeringError, match="idle and other have different bases"):
        diagnose(str(adapters["idle"]), str(other), "--data", str(tiny.data))


def test_intervals_are_paired_and_leave_out_what_is_not_defined() -> None:
    values = numpy.array([[0.0, 1.0], [0.0, 3.0], [float("nan"), 9.0]])
    found = with_interval(values)
    assert found["mean"] == [0, 2]
    assert (found["low"][0], found["high"][0]) == (0, 0)
    assert 1 <= found["low"][1] < 2 < found["high"][1] <= 3
    assert one_with_interval([2.0]) == {"mean": 2.0, "low": None, "high": None}
    assert with_interval([]) == {"mean": [], "low": [], "high": []}
    draws = numpy.random.default_rng(1).normal(size=(400, 1))
    found = with_interval(draws)
    expected = 1.96 * draws.std() / 20
    assert found["high"][0] - found["low"][0] == pytest.approx(2 * expected, rel=0.1)
