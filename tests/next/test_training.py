"""LLaVA-NeXT trains adapters through its own train(): `upstream/train/forks.py`, `training/data/pictured.py`."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import next_llava
import pytest
import torch
from next_llava import NextLlava
from safetensors.torch import load_file
from training_runs import FOUR_STEPS, train_in_process, upstream_globals_restored

from llava_steering_plugin.adapters.stored.locate import locate
from llava_steering_plugin.upstream.train.forks import mapped

WEIGHTS = "adapter_model.safetensors"
CLASSES = {"llava": "llava_llama", "llama": "llava_llama", "qwen": "llava_qwen"}


@pytest.mark.parametrize("base", CLASSES)
def test_training_writes_an_adapter_of_the_class_that_the_base_is(
    adapters: dict[str, Path], made: NextLlava, base: str
) -> None:
    folder = locate(adapters[base])
    assert folder.config.base.name_or_path == str(getattr(made, base))
    assert folder.llava_config is not None and folder.llava_config["model_type"] == CLASSES[base]
    assert folder.config.conversation == ("qwen_1_5" if base == "qwen" else "v1")
    tensors = load_file(adapters[base] / WEIGHTS)
    assert any("mm_projector" in name for name in tensors)
    assert any("image_newline" in name for name in tensors) == (base != "llava")
    steps = json.loads((adapters[base] / "trainer_state.json").read_text())["log_history"]
    assert all(step["grad_norm"] > 0 for step in steps if "loss" in step)


def test_a_resumed_training_ends_as_an_uninterrupted_one(made: NextLlava, patched_llava: Path, tmp_path: Path) -> None:
    flags = next_llava.flags(made, made.qwen, tmp_path / "run", FOUR_STEPS)
    train_in_process(flags)
    whole = load_file(tmp_path / "run" / WEIGHTS)
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    train_in_process(flags)
    resumed = load_file(tmp_path / "run" / WEIGHTS)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_train_mem_trains_and_the_projector_among_the_tunable_parts_is_what_a_mode_trains(
    made: NextLlava, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = {"mm_tunable_parts": "mm_mlp_adapter", "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    with upstream_globals_restored():
        monkeypatch.setattr(
            sys, "argv", ["train_mem.py", *next_llava.flags(made, made.llava, tmp_path / "run", overrides)]
        )
        runpy.run_module("llava.train.train_mem", run_name="__main__")
    for folder in (tmp_path / "run", tmp_path / "run/checkpoint-2"):
        assert any("mm_projector" in name for name in load_file(folder / WEIGHTS))
    assert not list(tmp_path.rglob("mm_projector.bin"))


@pytest.mark.parametrize("form", [["--mm_tunable_parts", "mm_mlp_adapter"], ["--mm_tunable_parts=mm_mlp_adapter"]])
def test_the_mapped_flag_leaves_the_command_line_and_other_values_stay(form: list[str]) -> None:
    assert mapped(["train.py", *form, "--bf16", "True"]) == ["train.py", "--bf16", "True"]
    other = ["train.py", "--mm_tunable_parts=mm_vision_tower,mm_mlp_adapter", "--bf16", "True"]
    assert mapped(other) == other


def test_what_cannot_be_trained_is_refused_at_once_with_what_to_write(
    made: NextLlava, patched_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unnamed = tmp_path / "b"
    unnamed.symlink_to(made.llava)
    overrides = {
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "unfreeze_mm_vision_tower": True,
    }
    with pytest.raises(SystemExit):
        train_in_process(next_llava.flags(made, unnamed, tmp_path / "run", overrides))
    said = capsys.readouterr().err
    assert "--mm_tunable_parts mm_vision_tower,mm_mlp_adapter,mm_language_model" in said
    assert "write --mm_tunable_parts mm_mlp_adapter" in said
    assert "--unfreeze_mm_vision_tower" in said
    assert f"--model_name_or_path {unnamed}" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("folder", "base", "takes"), [("yinghui", "qwen", "llava_llama"), ("models", "llava", None)])
def test_a_path_whose_words_mislead_is_refused_before_anything_is_loaded(
    made: NextLlava,
    patched_llava: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    folder: str,
    base: str,
    takes: str | None,
) -> None:
    misleading = tmp_path / folder / ("qwen" if base == "qwen" else "llava-v1.5-7b")
    misleading.parent.mkdir()
    misleading.symlink_to(getattr(made, base))
    with pytest.raises(SystemExit):
        train_in_process(next_llava.flags(made, misleading, tmp_path / "run"))
    said = capsys.readouterr().err
    assert (f"for 'yi' in it, it would take {takes}" if takes else "it has none of its words") in said
    assert f"This is a base for {CLASSES[base]}" in said


def test_a_sample_with_more_marks_than_images_or_a_video_that_is_missing_is_refused(
    made: NextLlava, patched_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = json.loads(made.data.read_text())
    samples[-3]["image"] = ["00.png"]
    samples[-1]["video"] = "gone.mp4"
    data = tmp_path / "bad.json"
    data.write_text(json.dumps(samples))
    with pytest.raises(SystemExit):
        train_in_process(next_llava.flags(made, made.llava, tmp_path / "run", {"data_path": data}))
    said = capsys.readouterr().err
    assert "it has 2 <image> and one picture" in said and "--several-images" in said
