"""`llava-steering export` of a LLaVA-1.6, whose pictures are cut into tiles, as transformers' LlavaNext, and back.

Logits are compared where transformers has that class: tests/newer/test_export_of_tiles.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiled
import torch
from safetensors.torch import load_file
from tiny_llava import TinyLlava

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.export.exporting import Export, export

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(scope="module")
def base(tiny: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiled.build(tiny, tmp_path_factory.mktemp("base") / "llava-v1.6-tiny")


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return export(str(base), tmp_path_factory.mktemp("exported") / "tiny-hf")


def test_it_is_a_llava_next_with_the_grid_heights_first(exported: Export, base: Path) -> None:
    config = json.loads((exported.folder / CONFIG).read_text())
    assert (config["model_type"], config["architectures"]) == ("llava_next", ["LlavaNextForConditionalGeneration"])
    processor = json.loads((exported.folder / "preprocessor_config.json").read_text())
    for each in (config, processor):
        assert each["image_grid_pinpoints"] == [[high, wide] for wide, high in tiled.GRID]
    assert processor["image_processor_type"] == "LlavaNextImageProcessor"
    tensors, before = load_file(exported.folder / WEIGHTS), load_file(base / WEIGHTS)
    assert torch.equal(tensors["image_newline"], before["model.image_newline"])
    assert any("no logits were compared" in note and "no LlavaNext" in note for note in exported.notes)


def test_it_comes_back_to_the_bit(exported: Export, base: Path, tmp_path: Path) -> None:
    back = export(str(exported.folder), tmp_path / "llava-back").folder
    before, after = load_file(base / WEIGHTS), load_file(back / WEIGHTS)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    old, new = (json.loads((folder / CONFIG).read_text()) for folder in (base, back))
    assert {key for key in old | new if old.get(key) != new.get(key)} == {"mm_vision_tower"}


def test_without_our_record_it_becomes_a_llava_in_tiles(exported: Export, tmp_path: Path) -> None:
    foreign = Path(shutil.copytree(exported.folder, tmp_path / "somebodys"))
    (foreign / "llava_export.json").unlink()
    back = export(str(foreign), tmp_path / "llava-made", conversation="vicuna_v1").folder
    config = json.loads((back / CONFIG).read_text())
    assert {key: config[key] for key in tiled.LAYOUT} == tiled.LAYOUT
    assert "image_grid_pinpoints" not in json.loads((back / "vision_tower/preprocessor_config.json").read_text())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image_aspect_ratio": "anyres_max_9"}, "LlavaNext has anyres with spatial_unpad alone"),
        ({"mm_patch_merge_type": "spatial"}, "LlavaNext has anyres with spatial_unpad alone"),
        ({"image_grid_pinpoints": None}, "needs a list of sizes"),
        ({"image_grid_pinpoints": "(1x1),(2x2)"}, "needs a list of sizes"),
        ({"mm_vision_select_feature": "cls_patch"}, "cls_patch"),
    ],
)
def test_other_layouts_are_refused(base: Path, tmp_path: Path, settings: dict[str, object], said: str) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "llava-other"))
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | settings))
    with pytest.raises(SteeringError, match=said):
        export(str(folder), tmp_path / "hf")


def test_a_class_token_in_every_tile_is_refused_on_the_way_back(exported: Export, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported.folder, tmp_path / "full"))
    config = json.loads((folder / CONFIG).read_text()) | {"vision_feature_select_strategy": "full"}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(SteeringError, match="keeps the class token of each"):
        export(str(folder), tmp_path / "llava-back")
