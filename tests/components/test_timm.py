"""Encoders of timm as towers (`components/towers/timm_encoders.py`), in a process that has timm on its path.

scripts/setup.sh puts timm and torchvision into a folder of their own; the first test runs the others with that folder.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llava import IMAGE_SIDE, TinyLlava
from tiny_towers import build_timm
from training_runs import train_flags, train_in_process

from llava_steering_plugin.components.base import ImageTokens, Tower
from llava_steering_plugin.components.image_tokens import of_model
from llava_steering_plugin.components.named import named_tower
from llava_steering_plugin.errors import ArgumentsError, SteeringError

HERE = importlib.util.find_spec("timm") is not None
APART = Path(sys.prefix) / "towers"
PIXELS = torch.randn(2, 3, IMAGE_SIDE, IMAGE_SIDE, generator=torch.Generator().manual_seed(0))
with_timm = pytest.mark.skipif(not HERE, reason="run by the test of the process that has timm")


def tower_of(name: str, layer: int = -2, feature: str = "patch") -> Tower:
    found = named_tower(name, layer, feature)
    assert found is not None
    return found


@pytest.mark.slow
@pytest.mark.skipif(HERE, reason="timm is installed: the tests run in this process")
@pytest.mark.skipif(not APART.is_dir(), reason="needs timm: scripts/setup.sh, or the extra towers")
def test_the_others_pass_in_a_process_that_has_timm(tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(APART))))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "inner")]
    done = subprocess.run(
        [*command, __file__], env=os.environ | {"PYTHONPATH": path}, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout[-4000:]


@with_timm
def test_timm_gives_the_tokens_of_a_layer_without_the_norm_behind_it(tmp_path: Path) -> None:
    import timm

    name = build_timm(tmp_path / "vit")
    tower = tower_of(name, -2)
    assert tower.shape().tokens == ImageTokens(16, 32, 4) and tower.shape().layers == 3
    encoder: Any = tower.load()
    outputs: list[torch.Tensor] = []
    encoder.blocks[-2].register_forward_hook(lambda block, given, made: outputs.append(made))
    with torch.no_grad():
        encoder(PIXELS)
        assert torch.equal(tower.encode(encoder, PIXELS), outputs[0][:, 1:])
    classed = tower_of(name, -2, "cls_patch")
    assert classed.shape().tokens == ImageTokens(17, 32, 4, 1)
    assert torch.equal(classed.encode(encoder, PIXELS).detach(), outputs[0])
    assert tower.image_processor().image_mean == [0.5, 0.5, 0.5]
    assert tower_of("timm:resnet18", -1).shape().tokens == ImageTokens(49, 512, 7)
    assert timm.is_model("resnet18")
    (tmp_path / "vit" / "pickle.pth").write_bytes(b"")
    for source, said in (
        ("resnet1", "did you mean 'resnet18'"),
        (str(tmp_path / "nowhere"), "there is no such folder"),
        (str(tmp_path), "no config.json in timm's layout"),
        (str(tmp_path / "vit" / "pickle.pth"), "of files only model.safetensors is read"),
    ):
        with pytest.raises(ArgumentsError, match=said):
            tower_of(f"timm:{source}").shape()
    for file in ("config.json", "model.safetensors"):  # a program would wait for a named pipe for ever
        build_timm(tmp_path / file)
        (tmp_path / file / file).unlink()
        os.mkfifo(tmp_path / file / file)
        with pytest.raises(SteeringError, match=f"{file}, which is no regular file"):
            tower_of(f"timm:{tmp_path / file}").shape()
    with pytest.raises(ArgumentsError, match="--mm_vision_select_layer is -9; the tower has 3 layers"):
        tower_of(name, -9).shape()
    with pytest.raises(ArgumentsError, match="the tower has patch"):
        tower_of("timm:resnet18", -1, "cls_patch").shape()


@with_timm
def test_a_training_with_an_encoder_of_timm_saves_and_loads(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path
) -> None:
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    output = tmp_path / "llava-timm"
    parts = {"model_name_or_path": tiny.llm, "vision_tower": build_timm(tmp_path / "vit"), "max_steps": 2}
    train_in_process(train_flags(tiny, output, {**parts, "mm_projector_type": "avgpool", "tuning_mode": "mores"}))
    name = get_model_name_from_path(str(output))
    _, model, processor, _ = load_pretrained_model(str(output), None, name, device="cpu", device_map="cpu")
    assert of_model(model) == ImageTokens(4, 64, 2) and processor.crop_size["height"] == IMAGE_SIDE
