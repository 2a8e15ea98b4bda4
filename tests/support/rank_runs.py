"""What trainings on several ranks are compared by: data in which ranks differ, and flags that make runs comparable."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_llava import TinyLlava

from llava_steering_plugin.adapters.stored.folder import StoredAdapter
from llava_steering_plugin.adapters.stored.locate import read

MORES: dict[str, object] = {"tuning_mode": "mores", "mores_rank": 2, "mores_tokens": "all"}
# Layers that learn which tokens they steer.
CHOICE: dict[str, object] = {"mores_tokens": "f1,uniform4,all"}
MIXLORA: dict[str, object] = {"tuning_mode": "mixlora"}
JOINT: dict[str, object] = {**MORES, "tuning_mode": "mores+mixlora"}

# With a trained projector, in float32, so that only the order of sums may differ.
PARITY: dict[str, object] = {**MORES, "bf16": False, "max_steps": 5, "group_by_modality_length": False}
ONE_RANK = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
TWO_RANKS = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}

# Random numbers in every step, and a checkpoint halfway.
RESUMABLE: dict[str, object] = {
    **MORES,
    "mores_dropout": 0.1,
    "bf16": False,
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "save_strategy": "steps",
    "save_steps": 3,
}


def mixed_data(tiny: TinyLlava, folder: Path) -> Path:
    """As many samples without as with images: with one sample a rank, some steps have an image on one rank alone."""
    samples = json.loads(tiny.data.read_text())
    texts = [sample for sample in samples if "image" not in sample]
    mixed = []
    for number, sample in enumerate([sample for sample in samples if "image" in sample][:12]):
        mixed += [sample, {**texts[number % len(texts)], "id": f"text-{number}"}]
    path = folder / "mixed.json"
    path.write_text(json.dumps(mixed))
    return path


def text_data(tiny: TinyLlava, folder: Path) -> Path:
    """No image at all."""
    path = folder / "text.json"
    path.write_text(json.dumps([sample for sample in json.loads(tiny.data.read_text()) if "image" not in sample]))
    return path


def resumed_from(whole: Path, step: int, output: Path) -> Path:
    """An output folder that finds the checkpoint which `whole`, not yet run, is going to write at that step."""
    output.mkdir(parents=True)
    (output / f"checkpoint-{step}").symlink_to(whole / f"checkpoint-{step}")
    return output


def assert_trained(adapter: StoredAdapter) -> None:
    """What is zero before training has moved further than runs that count as equal may differ."""
    moved = [value for name, value in adapter.tensors.items() if name.endswith(("steer_shift", "routed_b"))]
    assert max(float(value.abs().max()) for value in moved) > 1e-4


def assert_close(one: Path, other: Path, rtol: float = 1e-4, atol: float = 1e-7) -> None:
    first, second = read(one), read(other)
    assert first.tensors.keys() == second.tensors.keys()
    assert_trained(first)
    for name, value in first.tensors.items():
        torch.testing.assert_close(
            second.tensors[name], value, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_equal(one: Path, other: Path) -> None:
    first, second = read(one), read(other)
    assert first.tensors.keys() == second.tensors.keys()
    assert_trained(first)
    assert not [name for name, value in first.tensors.items() if not torch.equal(value, second.tensors[name])]


def losses(run: Path) -> list[float]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
