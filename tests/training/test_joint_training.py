"""A joint mode through upstream's own train(), and back through its own loader: both parts learn, and resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from quantising import quantising_on_cpu
from rank_runs import assert_equal
from tiny_llava import HIDDEN, LAYERS, TinyLlava
from training_runs import train_flags, train_in_process

from llava_steering_plugin import disable_adapter
from llava_steering_plugin.adapters.stored.folder import ADAPTER, EXTRA
from llava_steering_plugin.adapters.stored.locate import read
from llava_steering_plugin.training.saving.notes import gathered_in

FLAGS: dict[str, object] = {
    "tuning_mode": "mixlora+mores",  # in the other order than the mode's own name
    "mores_rank": 2,
    "mores_tokens": "all",
    "mores_dropout": 0.1,
    "mixlora_factors": 8,
    "mixlora_rank": 2,
    "mixlora_targets": "q_proj,down_proj",
    "mixlora_dropout": 0.1,
    "mixlora_balance": 1.0,
    "freeze_mm_mlp_adapter": True,
    "learning_rate": 5e-3,
    "max_steps": 11,  # one more than the gradient check watches
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "save_strategy": "steps",
    "save_steps": 4,
    "steering_diagnostics_steps": 11,
    "steering_diagnostics_samples": 2,
}
QUICK: dict[str, object] = {
    "max_steps": 1,
    "steering_diagnostics_steps": None,
    "steering_diagnostics_samples": None,
    "save_strategy": "no",
    "save_steps": None,
}
STEERING = LAYERS * (2 * HIDDEN * 2 + 2)


def train(tiny: TinyLlava, output: Path, overrides: Mapping[str, object] | None = None) -> Path:
    train_in_process(train_flags(tiny, output, {**FLAGS, **(overrides or {})}))
    return output


def refusal(tiny: TinyLlava, output: Path, overrides: Mapping[str, object], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        train(tiny, output, {"model_name_or_path": output / "no-such-model", **overrides})
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven steps, with everything that draws random numbers, and checkpoints after the fourth and the eighth."""
    return train(tiny, tmp_path_factory.mktemp("joint") / "run")


def test_both_parts_learn_and_nothing_else_is_saved(run: Path) -> None:
    stored = read(run)
    assert stored.config.mode == "mores+mixlora" and not stored.section(EXTRA)
    settings = {name: stored.config.settings[name] for name in ("mores_rank", "mixlora_rank", "mixlora_balance")}
    assert settings == {"mores_rank": 2, "mixlora_rank": 2, "mixlora_balance": 1.0}
    tensors = stored.section(ADAPTER)
    steering = {name: value for name, value in tensors.items() if "steer_" in name}
    assert sum(value.numel() for value in steering.values()) == STEERING
    assert len(tensors) == 3 * LAYERS + 5 * 2 * LAYERS
    last = f"layers.{LAYERS - 1}."
    for name, value in tensors.items():
        if name.endswith(("steer_shift", "routed_b")):
            assert value.any() or (name.startswith(last) and "steer_" in name), name
    described = json.loads((run / "llava_steering_config.json").read_text())
    assert (described["peft_type"], described["format_version"]) == ("LLAVA_MORES+MIXLORA", 1)


def test_routers_are_watched_balanced_and_measured_beside_the_steering(run: Path) -> None:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    losses = [entry for entry in history if "loss" in entry]
    assert len(losses) == 11 and all(0 < entry["mixlora_entropy_a"] <= 1.001 for entry in losses)
    gathered = gathered_in(run / "checkpoint-8")
    assert gathered is not None and list(gathered) == ["mixlora"]
    assert len([name for name in gathered["mixlora"] if name != "together"]) == 2 * 2 * LAYERS
    header, *measured = [json.loads(line) for line in (run / "diagnostics.jsonl").read_text().splitlines()]
    assert (header["mode"], header["settings"]["mixlora_factors"]) == ("mores+mixlora", 8)
    assert [entry["step"] for entry in measured] == [0, 11]
    first, end = measured
    assert first["update_norms"]["vis"]["mean"] == 0 < end["update_norms"]["vis"]["mean"]
    assert first["routing"].keys() == end["routing"].keys()


def test_the_table_counts_the_parts(tiny: TinyLlava, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny, tmp_path / "run", QUICK)
    shown = capsys.readouterr().out
    rows = {
        cells[0].strip("│ "): cells[1].strip() for line in shown.splitlines() if len(cells := line.split("│")[1:]) > 1
    }
    counts = {name: int(rows[name].replace(",", "")) for name in ("mores+mixlora", "of it mores", "of it mixlora")}
    assert counts["of it mores"] == STEERING
    assert counts["mores+mixlora"] == counts["of it mores"] + counts["of it mixlora"]


def test_a_resumed_run_ends_bit_equal_to_the_uninterrupted_one(tiny: TinyLlava, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    torch.manual_seed(1234)
    assert_equal(run, train(tiny, tmp_path / "run", {"tuning_mode": "mores+mixlora"}))


def test_it_goes_on_from_an_adapter_and_not_with_other_flags(
    tiny: TinyLlava, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = {**QUICK, "adapter_path": run}
    assert_equal(run, train(tiny, tmp_path / "same", {**adapter, "learning_rate": 0.0}))
    said = refusal(tiny, tmp_path / "other", {**adapter, "tuning_mode": "mores", "mixlora_rank": 4}, capsys)
    assert f"--adapter_path {run} is a mores+mixlora adapter and --tuning_mode says mores" in said
    assert "--mixlora_rank 4 contradicts the adapter in --adapter_path, which has 2" in said


def test_a_checkpoint_of_other_settings_of_either_part_is_refused(
    tiny: TinyLlava, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "checkpoint-8", tmp_path / "run" / "checkpoint-8")
    with pytest.raises(SystemExit):
        train(tiny, tmp_path / "run", {"mores_rank": 1, "mixlora_dropout": 0.2})
    said = capsys.readouterr().err
    assert "--mores_rank is 1 and was 2" in said and "--mixlora_dropout is 0.2 and was 0.1" in said


def test_it_answers_through_upstreams_loader_unlike_its_base(tiny: TinyLlava, run: Path) -> None:
    from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from PIL import Image

    name = get_model_name_from_path(str(run))
    tokenizer, model, processor, _ = load_pretrained_model(str(run), None, name, device="cpu")
    image = Image.open(next(tiny.images.iterdir()))
    asked: dict[str, Any] = {"images": process_images([image], processor, model.config).half()}
    prompt = "USER: <image>\nWhat color is the circle? ASSISTANT:"
    asked["input_ids"] = tokenizer_image_token(prompt, tokenizer, -200, return_tensors="pt")[None]
    with torch.inference_mode():
        on = model(**asked).logits
        with disable_adapter(model):
            off = model(**asked).logits
    assert not torch.allclose(on, off, atol=1e-2)


@pytest.fixture
def on_cpu(patched_llava: Path) -> Iterator[None]:
    with quantising_on_cpu():
        yield


def test_it_trains_over_four_bits(tiny: TinyLlava, on_cpu: None, tmp_path: Path) -> None:
    stored = read(train(tiny, tmp_path / "run", {**QUICK, "bits": 4, "max_steps": 2}))
    assert stored.config.trained_on["bits"] == 4
    moved = {
        name for name, value in stored.tensors.items() if name.endswith(("steer_shift", "routed_b")) and value.any()
    }
    assert len(moved) >= LAYERS - 1 + 2 * LAYERS


LORA: dict[str, object] = {
    **QUICK,
    "tuning_mode": "mores+peft",
    "peft_config": '{"r": 4, "lora_dropout": 0.1}',
    "mixlora_factors": None,
    "mixlora_rank": None,
    "mixlora_targets": None,
    "mixlora_dropout": None,
    "mixlora_balance": None,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
}


@pytest.mark.parametrize("bits", [16, 4])
def test_steering_and_lora_learn_and_resume_bit_equal(tiny: TinyLlava, on_cpu: None, tmp_path: Path, bits: int) -> None:
    whole = train(tiny, tmp_path / "whole", {**LORA, "bits": bits})
    stored = read(whole)
    assert (stored.config.mode, stored.config.settings["peft_method"]) == ("mores+peft", "lora")
    moved = [name.rpartition("steer_shift")[1] or name[-13:] for name, value in stored.tensors.items() if value.any()]
    assert moved.count("steer_shift") >= LAYERS - 1 and moved.count("lora_B.weight") == 7 * LAYERS
    shutil.copytree(whole / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    assert_equal(whole, train(tiny, tmp_path / "resumed", {**LORA, "bits": bits}))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"tuning_mode": "mores+mixlra"}, "--tuning_mode: unknown tuning mode 'mixlra': did you mean 'mixlora'"),
        ({"tuning_mode": "mores+mores"}, "a joint mode has two different parts"),
        ({"tuning_mode": "mores+lora"}, "write peft in its place, and add --peft_method lora"),
        ({"tuning_mode": "mores+"}, "lacks a part; write two modes, such as mores+mixlora"),
        ({"tuning_mode": "mores+mixlora+mores"}, "a joint mode has two parts"),
        ({"tuning_mode": "mores"}, "--mixlora_factors belongs to another mode than mores; remove it"),
        ({"mores_rank": 0, "mixlora_rank": 9}, "--mixlora_rank is 9; it must be from 1 to mixlora_factors, 8"),
        ({"mores_rank": 0, "mixlora_rank": 9}, "--mores_rank is 0; it must be at least 1"),
        ({"mores_rnak": 2}, "unknown flag --mores_rnak; did you mean --mores_rank"),
        ({"lora_enable": True}, "--lora_enable cannot be combined"),
        ({"tuning_mode": "none"}, "--mores_rank belongs to a tuning mode and none is on; add --tuning_mode mores"),
    ],
)
def test_command_lines_that_cannot_work_are_refused_before_a_model_is_loaded(
    tiny: TinyLlava, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: dict[str, object], said: str
) -> None:
    assert said in refusal(tiny, tmp_path / "refused", flags, capsys)
