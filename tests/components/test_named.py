"""A component is written NAME or NAME:SOURCE, a connector with its settings; what is wrong is said at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_steering_plugin.components.connectors.qformer import QFormer
from llava_steering_plugin.components.named import (
    named_connector,
    named_tower,
    unknown_connector,
    unknown_tower,
)
from llava_steering_plugin.components.towers.siglip import Siglip
from llava_steering_plugin.errors import ArgumentsError


def test_settings_follow_the_colon() -> None:
    assert named_connector("qformer:queries=64, layers=4") == QFormer(queries=64, layers=4)
    assert named_connector("qformer") == QFormer()


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(ArgumentsError) as caught:
        named_connector("qformer:querys=64,layers=four,heads")
    text = str(caught.value)
    assert "it has no 'querys': did you mean 'queries'?" in text
    assert "layers is 'four' where int is expected" in text and "'heads' is no setting" in text


def test_llavas_own_names_are_left_to_llava(tmp_path: Path) -> None:
    for own in ("linear", "identity", "mlp2x_gelu", "mlp12x_gelu", None):
        assert named_connector(own) is None
    for own in ("openai/clip-vit-large-patch14", str(tmp_path), None):
        assert named_tower(own) is None


def test_a_folder_of_a_components_name_stays_llavas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "siglip").mkdir()
    assert named_tower("siglip") == Siglip("", -1, "patch")
    monkeypatch.chdir(tmp_path)
    assert named_tower("siglip") is None


def test_a_tower_gets_source_layer_and_feature() -> None:
    assert named_tower("siglip:google/x", -2, "patch") == Siglip("google/x", -2, "patch")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("google/siglip-base-patch16-224", "did you mean 'siglip:google/siglip-base-patch16-224'?"),
        ("siglp:google/x", "did you mean 'siglip'?"),
        ("facebook/dinov2-base", "did you mean 'dinov2:facebook/dinov2-base'?"),
    ],
)
def test_an_unknown_tower_gets_a_hint_and_the_list(name: str, hint: str) -> None:
    text = str(unknown_tower(name))
    assert hint in text and "timm" in text and "LLaVA's own CLIP" in text


def test_an_unknown_connector_gets_a_hint_and_the_list() -> None:
    assert "did you mean 'qformer'?" in str(unknown_connector("qfromer:queries=3"))
    assert "did you mean 'mlp2x_gelu'?" in str(unknown_connector("mlp2_gelu"))
