"""An adapter of PEFT's is no base, neither of a training nor of an adapter: its projector would be dropped silently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_llava import TinyLlava

from llava_steering_plugin import attach, load_adapter, save_adapter
from llava_steering_plugin.adapters.fit.unmerged import unmerged_lora
from llava_steering_plugin.errors import BaseMismatch
from llava_steering_plugin.modes.mores import MoReS


@pytest.fixture(scope="module")
def lora(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA as LLaVA's training writes it."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("loras") / "llava-tiny-lora"
    base = LlavaLlamaForCausalLM.from_pretrained(tiny.llava)
    base.config.save_pretrained(folder)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    torch.save({}, folder / "non_lora_trainables.bin")
    return folder


def test_a_training_refuses_it_with_how_to_merge_it(tiny: TinyLlava, lora: Path, tmp_path: Path) -> None:
    from llava.train import train

    from llava_steering_plugin.training.settings.flags import read_request
    from llava_steering_plugin.upstream.train.training import flag_classes

    words = ["--output_dir", str(tmp_path), "--model_name_or_path", str(lora)]
    (problem,) = read_request(flag_classes(train), [*words, "--tuning_mode", "mores"]).problems
    assert problem.startswith(f"--model_name_or_path {lora} is an unmerged LORA of {tiny.llava}")
    assert f"merge_lora_weights.py --model-path {lora} --model-base {tiny.llava}" in problem
    assert read_request(flag_classes(train), words).problems == ()


def test_one_on_the_hub_is_known_by_the_copy_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--somebody--lora"
    (cached / "snapshots" / "0123").mkdir(parents=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": "somebody/base"}
    (cached / "snapshots" / "0123" / "adapter_config.json").write_text(json.dumps(config))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    assert "somebody/lora is an unmerged LORA of somebody/base" in str(unmerged_lora("somebody/lora"))
    assert unmerged_lora("somebody/else") is None and unmerged_lora(str(tmp_path / "nothing")) is None


def test_neither_a_loader_nor_load_adapter_takes_it(tiny: TinyLlava, lora: Path, tmp_path: Path) -> None:
    from llava.model.builder import load_pretrained_model
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    model = LlavaLlamaForCausalLM.from_pretrained(tiny.llava)
    attach(model, MoReS())
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(BaseMismatch, match="is an unmerged LORA of"):
        load_pretrained_model(str(tmp_path / "adapter"), str(lora), "llava-tiny", device="cpu")
    unmerged = LlavaLlamaForCausalLM.from_pretrained(lora)
    with pytest.raises(BaseMismatch, match="this model is an unmerged LoRA of"):
        load_adapter(unmerged, tmp_path / "adapter")
