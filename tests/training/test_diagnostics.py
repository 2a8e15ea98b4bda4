"""A training that is measured while it runs: it does not notice, and the numbers are those of its checkpoints.

Covers `training/diagnostics/callback.py`, `training/diagnostics/measuring.py`, `training/diagnostics/samples.py`,
`training/diagnostics/file.py` and `training/settings/diagnostics_flags.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_runs import assert_equal, losses, text_data
from reports import reported
from tiny_llava import LAYERS, VISUAL_TOKENS, TinyLlava
from torch import Tensor
from torch.nn import functional
from training_runs import train_flags, train_in_process

from llava_steering_plugin import __version__, attachment_of
from llava_steering_plugin.measures.modality import TEXTS, Kind, lmar, measure_shares
from llava_steering_plugin.measures.routing import routed_linears, use, watched_choices
from llava_steering_plugin.measures.steering import steerings, watched_norms
from llava_steering_plugin.training.data.samples import NumberedDataset
from llava_steering_plugin.training.diagnostics.file import DiagnosticsFile
from llava_steering_plugin.training.diagnostics.samples import choose_samples

COMMON: dict[str, object] = {
    "bf16": False,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 2,
    "freeze_mm_mlp_adapter": True,
    "learning_rate": 1e-2,
}
MORES = {**COMMON, "tuning_mode": "mores", "mores_rank": 2, "mores_modality": "vis+text", "mores_dropout": 0.1}
MORES |= {"mores_tokens": "all", "mores_layers": "0-2"}
MIXLORA = {**COMMON, "tuning_mode": "mixlora", "mixlora_dropout": 0.1, "mixlora_noise": 0.1, "mixlora_factors": 8}
MIXLORA |= {"mixlora_rank": 2, "mixlora_balance": 1.0, "mixlora_targets": "q_proj,down_proj"}
FLAGS = {"mores": MORES, "mixlora": MIXLORA}
MEASURED: dict[str, object] = {"steering_diagnostics_steps": 2, "steering_diagnostics_samples": 3}


def train(tiny: TinyLlava, output: Path, *flags: Mapping[str, object]) -> Path:
    merged: dict[str, object] = {}
    for each in flags:
        merged |= each
    torch.manual_seed(1234)
    train_in_process(train_flags(tiny, output, merged))
    return output


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "diagnostics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def validating(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    file = tmp_path_factory.mktemp("held-out") / "held-out.json"
    file.write_text(json.dumps(json.loads(tiny.data.read_text())[4:9]))
    return {"eval_data_path": file, "evaluation_strategy": "steps", "eval_steps": 5}


@pytest.fixture(scope="module", params=["mores", "mixlora"])
def measured(
    request: pytest.FixtureRequest,
    tiny: TinyLlava,
    patched_llava: Path,
    validating: dict[str, object],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A measured training, which logs for TensorBoard; MixLoRA's validates too. Read-only; named after the mode."""
    folder = tmp_path_factory.mktemp("measured")
    report = {"report_to": "tensorboard", "logging_dir": folder / "events"}
    more = validating if request.param == "mixlora" else {}
    return train(tiny, folder / request.param, FLAGS[request.param], MEASURED, report, more)


def test_a_training_ends_bit_equal_with_and_without_being_measured(
    tiny: TinyLlava, measured: Path, tmp_path: Path
) -> None:
    plain = train(tiny, tmp_path / "plain", FLAGS[measured.name])
    assert_equal(plain, measured)
    assert losses(plain) == losses(measured) and len(losses(plain)) == 5
    logged = [
        [
            {name: value for name, value in entry.items() if name.startswith("mixlora")}
            for entry in json.loads((run / "trainer_state.json").read_text())["log_history"]
            if "loss" in entry
        ]
        for run in (plain, measured)
    ]
    assert logged[0] == logged[1]
    assert not (plain / "diagnostics.jsonl").exists()


def test_the_first_line_says_what_is_measured(tiny: TinyLlava, measured: Path, validating: dict[str, object]) -> None:
    header = lines(measured)[0]
    validated = measured.name == "mixlora"
    path = validating["eval_data_path"] if validated else tiny.data
    assert header["data"] == str(path) and header["validation"] is validated
    assert {name: header[name] for name in ("format", "mode", "layers", "every")} == {
        **{"format": 1, "mode": measured.name, "layers": LAYERS, "every": 2},
    }
    assert header["settings"][{"mores": "tokens", "mixlora": "factors"}[measured.name]] in ("all", 8)
    assert header["plugin_version"] == __version__ and header["date"].endswith("+00:00")
    samples = json.loads(Path(str(path)).read_text())
    assert len(header["samples"]) == 3
    for each in header["samples"]:
        assert samples[each["number"]]["id"] == each["id"] and "image" in samples[each["number"]]


def test_it_is_measured_before_the_first_step_at_every_nth_and_at_the_end(measured: Path, tmp_path: Path) -> None:
    passes = lines(measured)[1:]
    assert [line["step"] for line in passes] == [0, 2, 4, 5]
    assert [line["epoch"] for line in passes] == pytest.approx([0, 2 / 6, 4 / 6, 5 / 6])
    for line in passes:
        assert line["lmar"]["answers"] == 3 and len(line["lmar"]["layers"]) == LAYERS
    assert passes[0]["lmar"] != passes[-1]["lmar"]
    if measured.name == "mores":
        assert all("routing" not in line for line in passes)
        assert passes[0]["update_norms"]["vis"] == {"tokens": 48, "mean": 0.0, "layers": [0.0, 0.0, 0.0, None]}
        assert passes[-1]["update_norms"]["vis"]["mean"] > 0 and passes[-1]["update_norms"]["text"]["mean"] > 0
    else:
        assert all("update_norms" not in line for line in passes)
        assert all(0 < line["routing"]["router_entropy"]["mean"] <= 1 for line in passes)

    page = reported(tmp_path / "report.html", measured)
    assert page.traces("attention ratio")[measured.name]["y"] == [line["lmar"]["mean"] for line in passes]
    assert page.traces("loss")[measured.name]["x"] == [1, 2, 3, 4, 5]
    assert "diagnostics/" not in page.text  # what the log has of every layer stands in the other file too


def test_tensorboard_gets_a_curve_for_every_layer_and_their_mean(measured: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(measured.parent / "events"))
    events.Reload()
    passes = lines(measured)[1:]
    curves = {tag for tag in events.Tags()["scalars"] if tag.startswith("train/diagnostics/")}
    ends = ["mean", *(f"layer_{layer:02d}" for layer in range(LAYERS))]
    expected = {
        "mores": [f"{name}/{end}" for name in ("update_norm_vis", "update_norm_text") for end in ends[:-1]],
        "mixlora": [f"{name}/{end}" for name in ("router_entropy", "factor_use") for end in ends],
    }[measured.name]
    assert curves == {f"train/diagnostics/{name}" for name in [*expected, *(f"lmar/{end}" for end in ends)]}
    for layer in range(LAYERS):
        curve = events.Scalars(f"train/diagnostics/lmar/layer_{layer:02d}")
        assert [point.step for point in curve] == [0, 2, 4, 5]
        assert [point.value for point in curve] == pytest.approx([line["lmar"]["layers"][layer] for line in passes])


def kinds_by_hand(ids: list[int], labels: list[int]) -> Tensor:
    """What the positions hold, from the ids before the splice; one image, and one turn or several."""
    kinds: list[int] = []
    for number, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if Kind.ANSWER in kinds and label < 0:
            kinds += [-1] * (len(ids) - number)
            break
        if token < 0:
            kinds += [Kind.IMAGE] * VISUAL_TOKENS
        else:
            kinds.append(Kind.ANSWER if label >= 0 else Kind.PROMPT if number else Kind.FIRST)
    return torch.tensor([kinds])


def test_the_numbers_are_those_of_the_measures_on_the_saved_checkpoint(tiny: TinyLlava, measured: Path) -> None:
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model
    from llava.train.train import DataArguments, DataCollatorForSupervisedDataset, LazySupervisedDataset

    header, line = lines(measured)[0], next(each for each in lines(measured) if each.get("step") == 4)
    path = str(measured / "checkpoint-4")
    tokenizer, model, processor, _ = load_pretrained_model(path, None, get_model_name_from_path(path), device="cpu")
    model.float()  # the vision tower stays as upstream's training has it
    model.get_vision_tower().half()
    tokenizer.pad_token = tokenizer.unk_token
    file = header["data"]
    data = DataArguments(file, is_multimodal=True, image_folder=str(tiny.images), image_aspect_ratio="pad")
    data.image_processor, data.mm_use_im_start_end = processor, False
    samples = LazySupervisedDataset(file, tokenizer, data)
    collate = DataCollatorForSupervisedDataset(tokenizer)
    modules = attachment_of(model).modules  # type: ignore[union-attr]
    linears = routed_linears(modules)
    shares = []
    with torch.no_grad(), watched_norms(steerings(modules)) as norms, watched_choices(linears) as rows:
        for each in header["samples"]:
            batch = collate([samples[each["number"]]])
            kinds = kinds_by_hand(batch["input_ids"][0].tolist(), batch["labels"][0].tolist())
            shares += measure_shares(model, lambda batch=batch: model(**batch), kinds)
    for name, text in (("layers", "all text"), ("without_first_token", "without the first token")):
        assert line["lmar"][name] == pytest.approx(lmar(shares, TEXTS[text]).tolist(), rel=2e-2)
    assert line["lmar"]["mean"] == pytest.approx(sum(line["lmar"]["layers"]) / LAYERS, rel=1e-4)
    for (layer, modality), values in norms.items():
        found = line["update_norms"][modality]["layers"][int(layer.removeprefix("layers."))]
        assert found == pytest.approx(values.mean(), rel=2e-2)
    for place in rows[0] if linears else ():
        assert line["routing"]["linears"][place[0]][place[1]]["use"] == pytest.approx(use(rows, place, 8).tolist())


def test_a_resumed_training_writes_no_step_twice_and_ends_with_the_same_file(
    tiny: TinyLlava, measured: Path, tmp_path: Path, validating: dict[str, object]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(measured / "checkpoint-4", run / "checkpoint-4")
    first, rest = (measured / "diagnostics.jsonl").read_text().split("\n", 1)
    date = "2026-01-02T03:04:05+00:00"  # of the start, which a resume keeps
    whole = json.dumps(json.loads(first) | {"date": date}) + "\n" + rest
    torn = whole.replace('"step": 5', '"step": 5, "lost": true') + '{"step": 6, "ep'
    (run / "diagnostics.jsonl").write_text(torn)
    train(tiny, run, FLAGS[measured.name], MEASURED, validating if measured.name == "mixlora" else {})
    assert (run / "diagnostics.jsonl").read_text() == whole
    assert_equal(measured, run)


def test_flags_that_ask_for_nothing_or_without_a_mode_are_refused(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*flags: Mapping[str, object]) -> str:
        with pytest.raises(SystemExit):
            train(tiny, tmp_path / "run", *flags)
        return capsys.readouterr().err

    steps, samples = "steering_diagnostics_steps", "steering_diagnostics_samples"
    assert f"--{steps} is -1; it must be at least 1, or 0" in error(MORES, {steps: -1})
    assert f"--{samples} is 0; it must be at least 1" in error(MORES, {steps: 2, samples: 0})
    assert f"--{samples} 4 has no effect without --{steps}" in error(MORES, {samples: 4})
    unmoded = error({steps: 2, samples: 4})
    assert all(f"--{name} works with a tuning mode only" in unmoded for name in (f"{steps} 2", f"{samples} 4"))


def test_without_an_image_the_ratio_alone_is_left_out_with_one_warning(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(tiny, tmp_path / "run", MIXLORA, MEASURED, {"data_path": text_data(tiny, tmp_path), "max_steps": 2})
    assert [message for message in caplog.messages if "steering_diagnostics" in message] == [
        "--steering_diagnostics_steps leaves out the modality attention ratio: none of the 3 samples has an image and "
        "an answer"
    ]
    assert [sorted(line) for line in lines(run)[1:]] == 2 * [["epoch", "routing", "step"]]


def test_attention_that_cannot_be_read_leaves_out_the_ratio_with_one_warning(
    tiny: TinyLlava,
    patched_llava: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attend = torch.ops.aten.scaled_dot_product_attention

    def unseen(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **more: Any) -> Any:
        return attend(query, key, value, attn_mask, **more)  # as the kernels of other packages, no function of PyTorch

    monkeypatch.setattr(functional, "scaled_dot_product_attention", unseen)
    run = train(tiny, tmp_path / "run", MORES, MEASURED, {"max_steps": 2, "save_strategy": "no"})
    (message,) = [message for message in caplog.messages if "steering_diagnostics" in message]
    assert "passes through none of PyTorch's functions" in message and "attn_implementation='sdpa'" in message
    assert [sorted(line) for line in lines(run)[1:]] == 2 * [["epoch", "step", "update_norms"]]


class Listed:
    """Stands for LLaVA's dataset: samples of one label each; number 1 cannot be read, and number 4 has no answer."""

    def __init__(self) -> None:
        self.list_data_dict = [{"id": f"n{n}"} | ({"image": "x.png"} if n % 2 else {}) for n in range(12)]

    def __len__(self) -> int:
        return len(self.list_data_dict)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number == 1:
            raise OSError("cannot be read")
        return {"labels": torch.tensor([-100 if number == 4 else 7])}


def test_samples_are_drawn_by_the_seed_those_with_an_image_first_and_bad_ones_are_passed_over() -> None:
    def numbers(count: int, seed: int) -> list[int]:
        chosen = choose_samples(NumberedDataset(Listed()), lambda samples: dict(samples[0]), count, seed)
        assert all(each.id == f"n{each.number}" for each in chosen)
        return [each.number for each in chosen]

    assert numbers(4, 0) == numbers(4, 0) == numbers(8, 0)[:4]
    assert len({tuple(numbers(4, seed)) for seed in range(5)}) > 1
    assert set(numbers(5, 0)) == {3, 5, 7, 9, 11}
    assert set(numbers(30, 0)) == {0, 2, 3, 5, 6, 7, 8, 9, 10, 11}


def test_a_file_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = DiagnosticsFile(tmp_path / "gone")
    file.begin({"samples": []}, 0)
    file.append({"step": 0})
    assert len(caplog.messages) == 1 and "cannot be written: No such file" in caplog.messages[0]


def test_lines_of_other_samples_are_kept_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = DiagnosticsFile(tmp_path)
    file.begin({"samples": [1]}, 0)
    for step in range(3):
        file.append({"step": step})
    file.begin({"samples": [2]}, 1)
    assert [line.get("step") for line in lines(tmp_path)] == [None, 0, 1]
    assert lines(tmp_path)[0]["samples"] == [2]
    assert "before step 1 are of other samples" in caplog.text
    file.begin({"samples": [3]}, 0)
    assert len(lines(tmp_path)) == 1
