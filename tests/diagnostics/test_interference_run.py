"""A run over training data measures the tasks of adapters and LoRAs, keeps what it has, and goes on where it ended.

Modules: diagnostics/interference/one_model.py, diagnostics/interference/run.py, diagnostics/task_data.py,
diagnostics/pictures/heat_maps.py, inference/tunable.py, inference/training_samples.py, cli/diagnose/interference.py.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diagnosing import diagnosed
from lora_folders import save_lora
from PIL import Image
from reports import reported
from steered import load_llava, strengthen
from tiny_llava import TinyLlava

from llava_steering_plugin import attach, save_adapter
from llava_steering_plugin.adapters.save_load import describe
from llava_steering_plugin.diagnostics.interference import run
from llava_steering_plugin.diagnostics.interference.one_model import Place, choose_samples, grouped
from llava_steering_plugin.diagnostics.task_data import Sample, check_samples
from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.modes.mixlora import MixLoRA

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def tuned(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tuned")
    model = load_llava(tiny.llava)
    attachment = strengthen(attach(model, MixLoRA(factors=4, rank=2, alpha=1.0)))
    described = describe(attachment)
    attachment.config = replace(
        described, conversation="v1", base=replace(described.base, name_or_path=str(tiny.llava))
    )
    save_adapter(model, root / "mixlora")
    return {"mixlora": root / "mixlora", "lora": save_lora(load_llava(tiny.llava), root / "lora", tiny.llava)}


@pytest.fixture(scope="module")
def tasks(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaVA's conversations with tasks: those about an image, and those about none."""
    samples = json.loads(tiny.data.read_text())
    for sample in samples:
        sample["task"] = "seeing" if "image" in sample else "knowing"
    file = tmp_path_factory.mktemp("data") / "tasks.json"
    file.write_text(json.dumps(samples))
    return file


@pytest.fixture
def diagnose(tiny: TinyLlava, patched_llava: Path, tmp_path: Path) -> Run:
    """Runs `llava-steering diagnose interference` and returns interference.json."""

    def run(models: dict[str, Path], *words: str) -> dict[str, Any]:
        named = (f"{name}={path}" for name, path in models.items())
        return diagnosed("interference", tiny, tmp_path / "out", *named, "--samples", "2", *words)

    return run


def test_an_adapter_and_a_lora_over_two_tasks(
    diagnose: Run, tuned: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    found = diagnose(tuned, "--data", str(tasks))
    assert found["tasks"] == ["seeing", "knowing"]
    mixlora, lora = found["models"]
    assert (mixlora["kind"], lora["kind"]) == ("mixlora", "lora")
    assert mixlora["samples"] == lora["samples"] == [2, 2]
    assert set(mixlora["sides"]) == {"all", "A", "B"} | ({"routers"} & set(mixlora["sides"]))
    assert set(lora["sides"]) == {"all", "A", "B"}
    for model in (mixlora, lora):
        assert {"0 q_proj A", "3 down_proj B", "all"} <= set(model["groups"])
        for side in model["sides"].values():
            assert [side["ratio_of_means"][task][task] for task in (0, 1)] == pytest.approx([1, 1])
        assert model["groups"]["all"]["ratio_of_means"][0][1] != pytest.approx(1)
    rows = list(csv.DictReader((tmp_path / "out" / "interference.csv").open()))
    wanted = {"model": "lora", "group": "all", "quantity": "mean_of_ratios", "loss of": "knowing", "step for": "seeing"}
    (row,) = [row for row in rows if wanted.items() <= row.items()]
    assert float(row["value"]) == lora["groups"]["all"]["mean_of_ratios"][1][0]
    with Image.open(tmp_path / "out" / "interference.png") as picture:
        assert picture.height > 300
    assert "knowing" in (tmp_path / "out" / "interference.svg").read_text()
    maps = reported(tmp_path / "report.html", tmp_path / "out").maps()
    assert lora["sides"]["all"]["ratio_of_means"] in [each["z"] for each in maps]


def test_an_interrupted_run_goes_on_and_ends_as_the_whole_one(
    diagnose: Run, tuned: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    adapter = {"mixlora": tuned["mixlora"]}
    whole = diagnose(adapter, "--data", str(tasks))
    kept = tmp_path / "out" / "interference"
    lines = (kept / "mixlora.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 5  # the settings and two samples of two tasks
    (kept / "mixlora.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:40])
    (kept / "mixlora.1.safetensors").unlink()
    assert diagnose(adapter, "--data", str(tasks)) == whole
    with pytest.raises(ArgumentsError, match=r"(?s)of other settings.*seed: 0 there, 5 now"):
        diagnose(adapter, "--data", str(tasks), "--seed", "5")


def test_steps_of_other_settings_are_not_taken_for_these(
    diagnose: Run, tuned: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    adapter, kept = {"mixlora": tuned["mixlora"]}, tmp_path / "out" / "interference"
    diagnose(adapter, "--data", str(tasks))
    (kept / "mixlora.jsonl").unlink()  # as the message about other settings says
    mixed = diagnose(adapter, "--data", str(tasks), "--seed", "5")
    shutil.rmtree(kept)
    assert mixed["models"] == diagnose(adapter, "--data", str(tasks), "--seed", "5")["models"]


def test_what_is_measured_is_not_loaded_again_unless_what_is_known_of_it_is_damaged(
    diagnose: Run, tuned: dict[str, Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, words = {"mixlora": tuned["mixlora"]}, ("--data", str(tasks))
    whole = diagnose(adapter, *words)
    about = tmp_path / "out" / "interference" / "mixlora.json"
    about.write_bytes(about.read_bytes()[:20])  # killed while it was written
    assert diagnose(adapter, *words) == whole
    monkeypatch.setattr(run, "open_tunable", lambda *_: pytest.fail("a model was loaded"))
    assert diagnose(adapter, *words) == whole


def test_a_task_may_be_a_file(diagnose: Run, tuned: dict[str, Path], tasks: Path, tmp_path: Path) -> None:
    words = []
    for task in ("seeing", "knowing"):
        samples = [sample for sample in json.loads(tasks.read_text()) if sample.pop("task") == task]
        (tmp_path / f"{task}.json").write_text(json.dumps(samples))
        words += ["--data", f"{task}={tmp_path / task}.json"]
    assert diagnose({"lora": tuned["lora"]}, *words)["tasks"] == ["seeing", "knowing"]


def test_bad_input_is_refused_before_a_model_loads(diagnose: Run, tiny: TinyLlava, tasks: Path, tmp_path: Path) -> None:
    nowhere = {"x": Path("/nowhere")}
    with pytest.raises(SteeringError, match=r'(?s)give each sample a "task".*24 of 24 samples of file 1 name no task$'):
        diagnose(nowhere, "--data", str(tiny.data))
    with pytest.raises(SteeringError, match="all samples are of the task 'all', and interference is between"):
        diagnose(nowhere, "--data", f"all={tiny.data}")
    with pytest.raises(SteeringError, match=r"tasks\.json is given 2 times"):
        diagnose(nowhere, "--data", str(tasks), "--data", f"again={tasks}")
    with pytest.raises(SteeringError, match="cannot be read"):
        diagnose(nowhere, "--data", str(tmp_path / "missing.json"))
    broken = json.loads(tasks.read_text())
    for sample in broken:
        if "image" in sample:
            sample["image"] = "gone.png"
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    with pytest.raises(SteeringError, match=r"(?s)cannot be trained on.*sample \d+ \(id 'image-\d+'\).*gone.png"):
        diagnose(nowhere, "--data", str(tmp_path / "broken.json"))
    with pytest.raises(SteeringError, match="neither an adapter nor an unmerged LoRA"):
        diagnose({"base": tiny.llava}, "--data", str(tasks))


def test_batches_are_independent_and_come_from_the_seed() -> None:
    entries = [{"task": "ab"[number % 2]} for number in range(40)] + [{"task": "c"}] * 3
    chosen = choose_samples([(None, entries)], 8, seed=1)
    assert {name: (len(each.steps), len(each.losses)) for name, each in chosen.items()} == {
        "a": (8, 8),
        "b": (8, 8),
        "c": (1, 1),
    }
    for each in chosen.values():
        assert not set(each.steps) & set(each.losses)
    assert chosen == choose_samples([(None, entries)], 8, seed=1) != choose_samples([(None, entries)], 8, seed=2)
    with pytest.raises(ArgumentsError, match="'d' has one sample"):
        choose_samples([(None, [*entries, {"task": "d"}])], 8, seed=1)


def test_parameters_are_grouped_by_layer_linear_and_side() -> None:
    names = {
        "layers.3.self_attn.q_proj.routed_a": Place(3, "q_proj", "A"),
        "layers.3.self_attn.q_proj.router_ab": Place(3, "q_proj", "routers"),
        "layers.3.self_attn.q_proj.router_a": Place(3, "q_proj", "routers"),
        "base_model.model.model.layers.12.mlp.up_proj.lora_B.default.weight": Place(12, "up_proj", "B"),
        "layers.1.vis.steer_basis": Place(1, "vis", "steer_basis"),
        "model.mm_projector.2.weight": Place(None, "mm_projector.2", "weight"),
    }
    parameters = {name: torch.nn.Parameter(torch.zeros(1)) for name in names}
    groups = grouped(parameters)
    for name, place in names.items():
        assert any(parameter is parameters[name] for parameter in groups[place])
    assert len(groups) == 5


def test_a_wrong_folder_of_images_is_one_line_and_many_bad_samples_are_counted(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    entries = [(None, [{"id": str(number), "image": "lost.png", "conversations": talk} for number in range(1000)])]
    chosen = [Sample(0, number) for number in range(1000)]
    files = [(None, Path("data.json"))]
    with pytest.raises(SteeringError, match=r"^there is no folder \S*/gone, where the images of the samples"):
        check_samples(files, entries, chosen, tmp_path / "gone", None)
    with pytest.raises(SteeringError, match=r"(?s)data.json: sample 0 .*\n  - and 980 more like these$"):
        check_samples(files, entries, chosen, tmp_path, None)
