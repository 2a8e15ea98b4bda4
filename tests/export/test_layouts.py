"""What cannot be exported is refused in one message, before anything is written (`export/layouts.py`)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llava import TinyLlava, without_half_of_its_weights

from llava_steering_plugin.adapters.stored.folder import AdapterFolder
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.export import exporting
from llava_steering_plugin.export.exporting import export

pytest_plugins = ["steered_fixtures"]


@pytest.fixture
def edited(tiny: TinyLlava, tmp_path: Path) -> Callable[..., Path]:
    def copy(**settings: Any) -> Path:
        folder = Path(shutil.copytree(tiny.llava, tmp_path / "base" / "llava-v1.5-edited"))
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy


def refusal(base: Path | str, target: Path, **options: Any) -> str:
    there = target.exists()
    with pytest.raises(SteeringError) as caught:
        export(str(base), target, **options)
    assert target.exists() == there and not list(target.parent.glob(".*.partial"))
    return str(caught.value)


def test_all_that_transformers_cannot_hold_is_in_one_message(edited: Callable[..., Path], tmp_path: Path) -> None:
    folder = edited(
        model_type="llava_mpt",
        mm_projector_type="mlp3x_gelu",
        image_aspect_ratio="anyres",
        mm_vision_tower="siglip:google/siglip",
        quantization_config={},
    )
    message = refusal(folder, tmp_path / "hf", conversation="vicuna_v2")
    for text in ("llava_mpt", "mlp3x_gelu", "LlavaNext", "siglip:google/siglip", "quantised", "vicuna_v2"):
        assert text in message


def test_a_plain_language_model_is_no_llava(tiny: TinyLlava, tmp_path: Path) -> None:
    assert "is no LLaVA: its config.json has model type 'llama'" in refusal(tiny.llm, tmp_path / "hf")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "there is no folder" in refusal(tmp_path / "nothing", tmp_path / "hf")


def test_a_target_that_is_taken_is_left_alone(tiny: TinyLlava, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("mine")
    assert "is not empty" in refusal(tiny.llava, tmp_path / "hf")
    assert [file.name for file in (tmp_path / "hf").iterdir()] == ["mine.txt"]
    assert "is a file" in refusal(tiny.llava, tmp_path / "hf" / "mine.txt")


def test_weights_that_are_missing_cut_or_strange_are_refused(tiny: TinyLlava, tmp_path: Path) -> None:
    cut = without_half_of_its_weights(tiny.llava, tmp_path / "llava-cut")
    assert "damaged" in refusal(cut, tmp_path / "hf")
    (cut / "model.safetensors").unlink()
    assert "holds no weights" in refusal(cut, tmp_path / "hf")
    (cut / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))
    assert "lacks model-00001.safetensors" in refusal(cut, tmp_path / "hf")
    (cut / "model.safetensors.index.json").unlink()
    tensors = load_file(tiny.llava / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, cut / "model.safetensors")
    assert "language_model.model.norm.weight is missing" in refusal(cut, tmp_path / "hf")
    save_file(tensors | {"model.norm.weight": norm, "model.image_newline": norm.clone()}, cut / "model.safetensors")
    assert "model.image_newline has no place" in refusal(cut, tmp_path / "hf")


def test_an_adapter_is_refused_and_its_base_named(saved: Path, tmp_path: Path) -> None:
    base = AdapterFolder(saved).read().config.base.name_or_path
    message = refusal(saved, tmp_path / "hf")
    assert f"is an adapter. Export its base, {base}; the adapter stays as it is" in message


def test_an_unmerged_lora_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "Merge it first" in refusal(tmp_path / "lora", tmp_path / "hf")


def test_a_second_linear_that_was_trained_is_none_of_llavas(tiny: TinyLlava, tmp_path: Path) -> None:
    export(str(tiny.llava), tmp_path / "hf", logits=False)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"projector_hidden_act": "linear"}))
    assert "was trained" in refusal(tmp_path / "hf", tmp_path / "llava-back")


def test_a_pickle_is_opened_only_for_its_tensors(edited: Callable[..., Path], tmp_path: Path) -> None:
    folder = edited()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    export(str(folder), tmp_path / "hf", logits=False)

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"model.norm.weight": Bomb()}, folder / "pytorch_model.bin")
    assert "it was not opened" in refusal(folder, tmp_path / "again")
    assert not (tmp_path / "exploded").exists()


def test_a_disk_that_is_too_small_is_refused_and_nothing_is_left(
    tiny: TinyLlava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "1,000 free" in refusal(tiny.llava, tmp_path / "hf")


def test_what_a_killed_export_left_is_cleared_away(tiny: TinyLlava, tmp_path: Path) -> None:
    left = tmp_path / ".hf.999999999.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    export(str(tiny.llava), tmp_path / "hf", logits=False)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
