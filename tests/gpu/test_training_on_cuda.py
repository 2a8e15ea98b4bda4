"""Upstream's train() on one GPU: half precision with a gradient scaler, 4-bit and 8-bit backbones, and a resume."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llava import TinyLlava
from training_runs import train_flags, train_in_process

from llava_steering_plugin.adapters.stored.folder import ADAPTER, EXTRA, StoredAdapter
from llava_steering_plugin.adapters.stored.locate import read

pytestmark = pytest.mark.gpu

MODES: dict[str, dict[str, object]] = {
    "mores": {"tuning_mode": "mores", "mores_rank": 2, "mores_tokens": "all"},
    "mixlora": {"tuning_mode": "mixlora"},
}
# More than the ten steps after which a parameter without a gradient would have stopped the training.
STEPS = 11


@pytest.fixture(autouse=True)
def one_gpu(patched_llava: Path) -> None:
    if torch.cuda.device_count() > 1:
        pytest.skip("one process trains on one GPU; show one only: CUDA_VISIBLE_DEVICES=0")


def train(tiny: TinyLlava, output: Path, overrides: Mapping[str, object]) -> StoredAdapter:
    train_in_process(train_flags(tiny, output, {"use_cpu": None, "max_steps": STEPS, **overrides}))
    stored = read(output)
    assert all(bool(value.isfinite().all()) for value in stored.tensors.values())
    return stored


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_every_mode_trains_with_its_projector_in_every_precision_and_quantisation(
    tiny: TinyLlava, tmp_path: Path, mode: str, precision: str, bits: int
) -> None:
    chosen = {"bf16": precision == "bf16", "fp16": precision == "fp16", "bits": bits}
    stored = train(tiny, tmp_path / "run", {**MODES[mode], **chosen})
    assert stored.config.trained_on["bits"] == bits
    assert {value.dtype for value in stored.section(ADAPTER).values()} == {torch.float32}
    before = torch.load(tiny.projector, weights_only=True)
    # GradScaler skips the first steps while it looks for its scale, so some change is all that can be promised.
    assert any(not torch.equal(value.float(), before[name].float()) for name, value in stored.section(EXTRA).items())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_both_kinds_of_four_bits_train_with_and_without_checkpointing_alike(
    tiny: TinyLlava, tmp_path: Path, quant_type: str
) -> None:
    common = {**MODES["mores"], "bits": 4, "quant_type": quant_type, "bf16": False, "freeze_mm_mlp_adapter": True}
    common |= {"max_steps": 3}
    plain = train(tiny, tmp_path / "plain", {**common, "gradient_checkpointing": False})
    recomputed = train(tiny, tmp_path / "recomputed", {**common, "gradient_checkpointing": True})
    for name, value in plain.tensors.items():
        torch.testing.assert_close(recomputed.tensors[name], value, rtol=1e-2, atol=1e-4, msg=name)


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tiny: TinyLlava, tmp_path: Path) -> None:
    flags = {**MODES["mores"], "mores_dropout": 0.1, "bf16": False, "save_strategy": "steps", "save_steps": 4}
    whole = train(tiny, tmp_path / "whole", flags)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed = train(tiny, tmp_path / "resumed", flags)
    for name, value in whole.tensors.items():
        torch.testing.assert_close(resumed.tensors[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("how", [{"load_4bit": True}, {"load_8bit": True}, {}], ids=["4 bits", "8 bits", "16 bits"])
def test_what_was_trained_on_four_bits_answers_on_any(tiny: TinyLlava, tmp_path: Path, how: dict[str, Any]) -> None:
    from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from PIL import Image

    train(tiny, tmp_path / "pets", {**MODES["mores"], "bits": 4})
    path = str(tmp_path / "pets")
    tokenizer, model, processor, _ = load_pretrained_model(path, None, get_model_name_from_path(path), **how)
    for name, value in read(path).section(EXTRA).items():
        assert torch.equal(model.get_parameter(name).cpu(), value.to(model.dtype))
    picture = Image.open(sorted(tiny.images.iterdir())[0]).convert("RGB")
    pixels = process_images([picture], processor, model.config).to(model.device, torch.float16)
    prompt = "USER: <image>\nWhat color is it? ASSISTANT:"
    ids = tokenizer_image_token(prompt, tokenizer, -200, return_tensors="pt")[None].to(model.device)
    with torch.inference_mode():
        answer = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=4)
    assert answer.numel() > 0
