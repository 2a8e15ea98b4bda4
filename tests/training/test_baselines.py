"""`--tuning_mode peft`: PEFT's methods trained through upstream's train(), with what all modes have.

Covers `modes/peft/`, as far as trainings use it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_samples import write_data
from baselines import TRAINED, by_peft, flags_of, moved
from diagnosing import diagnosed
from quantising import quantising_on_cpu
from steered import PROMPT, ids_of, load_llava, logits_of, pictures
from tiny_llava import TinyLlava
from training_runs import train_flags, train_in_process
from typer.testing import CliRunner

from llava_steering_plugin import disable_adapter, load_adapter
from llava_steering_plugin.adapters.attachment import required
from llava_steering_plugin.adapters.stored.folder import ADAPTER, CARD, EXTRA, WEIGHTS
from llava_steering_plugin.adapters.stored.locate import read
from llava_steering_plugin.cli import app
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.inference.tunable import open_tunable
from llava_steering_plugin.planning.from_flags import Wanted
from llava_steering_plugin.planning.plan import plan


def slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def root(patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("baselines")


def flags_for(tiny: TinyLlava, root: Path, name: str) -> dict[str, object]:
    """Flags of a baseline. LoRA's training also skips a bad sample, validates and measures, as every mode can."""
    if name != "lora":
        return flags_of(name)
    samples = json.loads(tiny.data.read_text())
    return flags_of(name) | {
        "data_path": write_data(root, [*samples[:16], samples[0] | {"id": "lost", "image": "lost.png"}]),
        "skip_bad_samples": True,
        "eval_data_path": write_data(root, samples[16:], "held-out.json"),
        "evaluation_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "steering_diagnostics_steps": 2,
    }


def trained(tiny: TinyLlava, root: Path, name: str) -> Path:
    if not (root / name).exists():
        train_in_process(train_flags(tiny, root / name, flags_for(tiny, root, name)))
    return root / name


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_moves_every_parameter_and_resumes_bit_equal(
    tiny: TinyLlava, root: Path, tmp_path: Path, name: str
) -> None:
    whole = read(trained(tiny, root, name))
    start = read(root / name / "checkpoint-2").section(ADAPTER)
    assert not whole.section(EXTRA)
    assert not [key for key, value in whole.section(ADAPTER).items() if torch.equal(value, start[key])]
    assert f"# peft ({name}) adapter for" in (root / name / CARD).read_text()
    shutil.copytree(root / name / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    torch.manual_seed(1234)
    train_in_process(train_flags(tiny, tmp_path / "run", flags_for(tiny, root, name)))
    resumed = read(tmp_path / "run")
    assert resumed.config == whole.config
    assert resumed.tensors.keys() == whole.tensors.keys()
    assert not [key for key, value in whole.tensors.items() if not torch.equal(value, resumed.tensors[key])]


def test_a_training_validates_skips_bad_samples_and_measures_while_it_runs(tiny: TinyLlava, root: Path) -> None:
    folder = trained(tiny, root, "lora")
    skipped = json.loads((folder / "skipped_samples.json").read_text())
    assert [each["id"] for each in skipped] == ["lost"]
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    losses = {each["step"]: each["eval_loss"] for each in state["log_history"] if "eval_loss" in each}
    assert sorted(losses) == [2, 4] and state["best_metric"] == min(losses.values())
    head, *measured = map(json.loads, (folder / "diagnostics.jsonl").read_text().splitlines())
    assert head["mode"] == "peft" and [each["step"] for each in measured] == [0, 2, 4]


@pytest.mark.parametrize("name", TRAINED)
def test_a_plan_counts_what_a_training_trains(tiny: TinyLlava, root: Path, name: str) -> None:
    found = plan(train_flags(tiny, root / "planned", flags_of(name)))
    assert found.problems == () and found.counts is not None
    assert (found.mode, found.full_name) == ("peft", f"peft ({name})")
    assert found.counts.mode == sum(
        value.numel() for value in read(trained(tiny, root, name)).section(ADAPTER).values()
    )


# DoRA alone reads weights of its host, which a plan has no values of.
@pytest.mark.parametrize("name", [each if each == "dora" else slow(each) for each in TRAINED])
def test_a_plan_goes_through_a_step_to_count_its_memory(tiny: TinyLlava, root: Path, name: str) -> None:
    found = plan(train_flags(tiny, root / "planned", flags_of(name)), Wanted(gpu="24"))
    assert found.problems == () and found.memory is not None
    assert not (root / "planned").exists()


# DoRA alone reads packed weights.
@pytest.mark.parametrize("name", [each if each == "dora" else slow(each) for each in TRAINED])
def test_a_base_of_four_bits_trains_it_in_float32_and_answers_by_it(tiny: TinyLlava, tmp_path: Path, name: str) -> None:
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    with quantising_on_cpu():
        train_in_process(train_flags(tiny, tmp_path / "run", {**flags_of(name), "bits": 4, "save_strategy": "no"}))
        found = get_model_name_from_path(str(tmp_path / "run"))
        _, model, _, _ = load_pretrained_model(str(tmp_path / "run"), None, found, device="cpu", load_4bit=True)
    stored = read(tmp_path / "run")
    assert {value.dtype for value in stored.section(ADAPTER).values()} == {torch.float32}
    with torch.no_grad():
        moved(required(model).parameters().values(), size=0.3)
    ids, pixels = ids_of(PROMPT), pictures(1).half()
    here = logits_of(model, ids, pixels)
    with disable_adapter(model):
        plain = logits_of(model, ids, pixels)
    assert here.isfinite().all() and not torch.allclose(here, plain, atol=1e-2)


def test_the_commands_open_it_as_any_adapter_and_name_its_method(tiny: TinyLlava, root: Path) -> None:
    folder, other = str(trained(tiny, root, "lora")), str(trained(tiny, root, "ia3"))
    how = {"device": "cpu", "load_4bit": False, "load_8bit": False}
    tunable = open_tunable(folder, None, how)
    assert (tunable.kind, tunable.base) == ("peft (lora)", str(tiny.llava))
    assert tunable.parameters.keys() == read(folder).section(ADAPTER).keys()
    assert all(parameter.requires_grad for parameter in tunable.parameters.values())
    chat = CliRunner().invoke(app, ["chat", folder, other, "--device", "cpu"], input="/adapter\n")
    assert chat.exit_code == 0, chat.output
    listed = [line.split() for line in chat.stderr.splitlines() if "parameters" in line]
    assert [line[-6:-3] for line in listed] == [["lora", "peft", "(lora)"], ["ia3", "peft", "(ia3)"]]


def test_diagnoses_of_other_modes_refuse_it_and_name_one_that_takes_it(
    tiny: TinyLlava, root: Path, tmp_path: Path
) -> None:
    for measure, mode in (("steering", "mores"), ("routing", "mixlora")):
        said = rf"is a peft adapter, and `diagnose {measure}` is for {mode}: use `llava-steering diagnose modality`"
        with pytest.raises(ArgumentsError, match=said):
            diagnosed(measure, tiny, tmp_path, str(trained(tiny, root, "lora")), "--data", str(tiny.data))


def test_peft_loads_a_trained_lora_on_the_plain_base_and_answers_alike(tiny: TinyLlava, root: Path) -> None:
    folder = trained(tiny, root, "lora")
    ours, theirs = load_llava(tiny.llava), load_llava(tiny.llava)
    load_adapter(ours, folder)
    here = logits_of(ours, ids_of(PROMPT), pictures(1))
    assert torch.equal(here, logits_of(by_peft(theirs, folder), ids_of(PROMPT), pictures(1)))
    assert not [path.name for path in folder.iterdir() if path.suffix == ".bin" and path.name != "training_args.bin"]
    assert (folder / WEIGHTS).stat().st_size < 200_000
