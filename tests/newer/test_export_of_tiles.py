"""A LLaVA-1.6 and the LlavaNext that `llava-steering export` makes of it answer the same, both in one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiled
from tiny_llava import TinyLlava

from llava_steering_plugin.export import verification
from llava_steering_plugin.export.exporting import export
from llava_steering_plugin.export.verification import compare_answers, picture

# Parts of a photograph, by width and height: of all shapes that lead to other tiles, and of odd numbers of pixels.
SIZES = [(256, 256), (256, 60), (256, 85), (255, 128), (201, 133), (60, 256), (87, 255), (131, 199), (30, 40), (57, 55)]


def test_logits_are_compared_on_three_shapes_both_ways(tiny: TinyLlava, tmp_path: Path) -> None:
    base = tiled.build(tiny, tmp_path / "llava-v1.6-tiny")
    there = export(str(base), tmp_path / "hf")
    back = export(str(there.folder), tmp_path / "llava-back")
    for each in (there, back):
        assert any("a wide and a high part of it, in float32: they differ by at most" in check for check in each.checks)


def test_pictures_of_all_shapes_have_the_same_pixels_tokens_and_logits(tiny: TinyLlava, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = tiled.build(tiny, tmp_path / "llava-v1.6-tiny")
    exported = export(str(base), tmp_path / "hf", logits=False).folder
    image, _ = picture(None)
    images = [image.crop((0, 0, *size)) for size in SIZES]
    prompt = "USER: <image>\nWhat is it? ASSISTANT:"
    tokenizer = AutoTokenizer.from_pretrained(base, use_fast=False)
    first = verification.llavas_answer(base, tiny.tower, images, prompt, tokenizer)
    second = verification.transformers_answer(exported, images, prompt, tiles=True)
    for size, one, other in zip(SIZES, first, second, strict=True):
        assert compare_answers(one, other) <= verification.TOLERANCE, size
    assert len({each.logits.shape[0] for each in first}) >= 4


def test_sides_that_are_not_exchanged_are_noticed(
    tiny: TinyLlava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiled.build(tiny, tmp_path / "llava-v1.6-tiny")
    original = verification.transformers_answer

    def as_llava_has_them(folder: Path, *args: Any, **options: Any) -> Any:
        other = Path(shutil.copytree(folder, tmp_path / "other"))
        for name in ("config.json", "preprocessor_config.json"):
            described = json.loads((other / name).read_text()) | {"image_grid_pinpoints": tiled.GRID}
            (other / name).write_text(json.dumps(described))
        return original(other, *args, **options)

    monkeypatch.setattr(verification, "transformers_answer", as_llava_has_them)
    with pytest.raises(Exception, match=r"other pixels|tokens of the prompt"):
        export(str(base), tmp_path / "hf")
