"""MixLoRA through upstream's own train(), and back through its own loader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llava import HIDDEN, LAYERS, TinyLlava
from training_runs import train_flags, train_in_process

from llava_steering_plugin import disabled
from llava_steering_plugin.adapters.stored.folder import ADAPTER, EXTRA, StoredAdapter
from llava_steering_plugin.adapters.stored.locate import read

MIXLORA = {
    "tuning_mode": "mixlora",
    "mixlora_factors": 8,
    "mixlora_rank": 2,
    "mixlora_targets": "q_proj,v_proj,down_proj",
    "freeze_mm_mlp_adapter": True,
}
# In and out features of the targets in one layer.
TARGETS = ((HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (2 * HIDDEN, HIDDEN))
POOLS = sum(8 * (wide + out) for wide, out in TARGETS)
ROUTERS = sum(2 * 8 * wide + 2 * 8 * wide for wide, _ in TARGETS)
RESUMABLE = {"mixlora_dropout": 0.1, "mixlora_noise": 0.1, "mixlora_balance": 0.01, "max_steps": 10}


def train(tiny: TinyLlava, output: Path, overrides: Mapping[str, object]) -> tuple[StoredAdapter, list[dict[str, Any]]]:
    history = train_in_process(train_flags(tiny, output, {**MIXLORA, **overrides}))
    return read(output), history


@pytest.fixture(scope="module")
def whole_run(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps, one and two thirds epochs, with checkpoints after the fourth and the eighth."""
    output = tmp_path_factory.mktemp("mixlora") / "run"
    train(tiny, output, {**RESUMABLE, "save_strategy": "steps", "save_steps": 4, "learning_rate": 5e-3})
    return output


def test_pools_and_routers_are_saved_and_nothing_else(whole_run: Path) -> None:
    stored = read(whole_run)
    assert sum(value.numel() for value in stored.section(ADAPTER).values()) == LAYERS * (POOLS + ROUTERS)
    assert not stored.section(EXTRA)
    assert stored.config.mode == "mixlora"
    assert all(bool(value.any()) for name, value in stored.tensors.items() if name.endswith("routed_b"))


def test_router_entropy_and_factor_usage_are_logged_with_the_loss(whole_run: Path) -> None:
    history = json.loads((whole_run / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert len(steps) == 10
    for entry in steps:
        for side in "ab":
            assert 0 < entry[f"mixlora_entropy_{side}"] <= 1.001
            assert 2 <= entry[f"mixlora_factors_{side}"] <= 8.001


@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_ends_bit_equal_to_the_uninterrupted_one(
    tiny: TinyLlava, whole_run: Path, tmp_path: Path, step: int
) -> None:
    shutil.copytree(whole_run / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    torch.manual_seed(1234)
    flags = {**RESUMABLE, "save_strategy": "steps", "save_steps": 4, "learning_rate": 5e-3}
    resumed, _ = train(tiny, tmp_path / "run", flags)
    whole = read(whole_run)
    assert resumed.tensors.keys() == whole.tensors.keys()
    assert not [name for name, value in whole.tensors.items() if not torch.equal(value, resumed.tensors[name])]


def test_frozen_routers_train_are_saved_as_they_were_drawn_and_load(tiny: TinyLlava, tmp_path: Path) -> None:
    flags = {"mixlora_router_grad": "none", "mixlora_routing": "sequence", "max_steps": 2}
    short, _ = train(tiny, tmp_path / "short", flags)
    longer, _ = train(tiny, tmp_path / "longer", {**flags, "max_steps": 3})
    for name, value in longer.section(ADAPTER).items():
        same = torch.equal(value, short.section(ADAPTER)[name])
        assert same == (".router_" in name), name


def test_a_trained_adapter_answers_through_upstreams_loader_unlike_its_base(tiny: TinyLlava, whole_run: Path) -> None:
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from PIL import Image

    name = get_model_name_from_path(str(whole_run))
    tokenizer, model, processor, _ = load_pretrained_model(str(whole_run), None, name, device="cpu")
    model = model.float()
    image = Image.open(next(tiny.images.iterdir()))
    pixels = process_images([image], processor, model.config).float()
    ids = [
        tokenizer_image_token(f"USER: <image>\n{question} ASSISTANT:", tokenizer, IMAGE_TOKEN_INDEX)
        for question in ("What color is the circle?", "What shape is red?")
    ]

    def answer(number: int, **how: Any) -> list[int]:
        prompt = torch.tensor([ids[number]])
        with torch.inference_mode():
            output = model.generate(prompt, images=pixels, image_sizes=[image.size], max_new_tokens=12, **how)
        return output[0].tolist()

    adapted = [answer(number, do_sample=False) for number in (0, 1)]
    assert [answer(number, do_sample=False) for number in (0, 1)] == adapted
    assert answer(0, do_sample=False, num_beams=2)
    with disabled(model):
        base = [answer(number, do_sample=False) for number in (0, 1)]
    assert adapted != base


def test_settings_that_contradict_each_other_are_refused_before_a_model_is_loaded(
    tiny: TinyLlava, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"mixlora_rank": 9, "mixlora_variant": "released", "mixlora_routing": "prompt", "mores_rank": 2}
    with pytest.raises(SystemExit) as stopped:
        train(tiny, tmp_path / "refused", {**bad, "model_name_or_path": tmp_path / "no-such-model"})
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    for part in ("--mixlora_rank is 9", "--mixlora_routing prompt contradicts", "--mores_rank belongs to another mode"):
        assert part in error
