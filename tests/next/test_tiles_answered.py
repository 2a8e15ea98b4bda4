"""Pictures in LLaVA-NeXT's tiles where they are asked about: their length in a prompt, and where their patches lie.

Covers `inference/context.py`, `inference/asking/question_lengths.py` and `inference/patch_grid.py`, which cut by every
name that `process_images` cuts by.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import next_llava
import pytest
import torch
from next_llava import NextLlava
from PIL import Image

from llava_steering_plugin.components.picture_layouts import grid_of
from llava_steering_plugin.errors import ArgumentsError, SteeringError
from llava_steering_plugin.inference.asking.question_lengths import check_lengths
from llava_steering_plugin.inference.asking.questions import Question
from llava_steering_plugin.inference.context import PromptTokens
from llava_steering_plugin.inference.images import image_arguments
from llava_steering_plugin.inference.patch_grid import patch_grid, window_numbers

ASPECTS = ("anyres", "anyres_max_2", "anyres_max_9", "square", "pad")
SIZES = [(56, 56), (120, 56), (40, 72), (301, 200), (33, 190)]
IMAGE = -200


@pytest.fixture
def tiled(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how the model cuts pictures."""
    grid = list(map(list, grid_of(next_llava.GRID, 56)))

    def become(aspect: str, merge: str = "spatial_unpad") -> Any:
        settings = {"image_aspect_ratio": aspect, "mm_patch_merge_type": merge, "image_grid_pinpoints": grid}
        for name, value in settings.items():
            monkeypatch.setattr(model.config, name, value, raising=False)
        return model

    return become


def looked_at(model: Any, size: tuple[int, int]) -> dict[str, Any]:
    processor = model.get_vision_tower().image_processor
    given = image_arguments([Image.new("RGB", size)], processor, model)
    stacked = isinstance(given["images"], torch.Tensor)
    return given | {"images": given["images"].float() if stacked else [each.float() for each in given["images"]]}


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad", "spatial_unpad_nobase", "spatial_maxpool2x2"])
@pytest.mark.parametrize("aspect", ASPECTS)
def test_a_prompt_is_as_long_as_the_splice_makes_it(tiled: Any, aspect: str, merge: str) -> None:
    model, ids = tiled(aspect, merge), [1, 300, IMAGE, 301, 302]
    lengths = set()
    for size in SIZES:
        with torch.no_grad():
            spliced = model.prepare_inputs_labels_for_multimodal(
                torch.tensor([ids]), None, None, None, None, **looked_at(model, size)
            )
        lengths.add(length := spliced[4].shape[1])
        assert PromptTokens.of_model(model).count(ids, [size]) == length, size
    assert (len(lengths) > 1) is (aspect not in ("square", "pad"))


@pytest.mark.parametrize(("aspect", "most"), [("anyres", 88), ("anyres_max_9", 88), ("anyres_max_2", 46), ("pad", 16)])
def test_a_question_that_is_too_long_is_named_with_its_tiles_before_the_model_is_loaded(
    made: NextLlava, patched_llava: Path, tmp_path: Path, aspect: str, most: int
) -> None:
    Image.new("RGB", (112, 112)).save(tmp_path / "square.png")
    described = json.loads((made.llava / "config.json").read_text())
    described |= {"image_aspect_ratio": aspect, "mm_patch_merge_type": "spatial_unpad"}
    described |= {"image_grid_pinpoints": [list(size) for size in grid_of(next_llava.GRID, 56)]}

    question = Question("q", "red", ("square.png",), "__base__")

    def said(**config: Any) -> str:
        try:
            check_lengths([question], tmp_path, str(made.llava), described | config, {}, 1)
        except ArgumentsError as error:
            return str(error)
        return ""

    def length(**config: Any) -> int:
        return int(re.findall(r"question 'q': (\d+) tokens", said(max_position_embeddings=8, **config))[0])

    text = length(image_aspect_ratio="pad") - 16  # the prompt's own
    assert length() == text + most
    assert said(tokenizer_model_max_length=text + most) == ""
    assert f"the model takes {text + most - 1}" in said(tokenizer_model_max_length=text + most - 1)


def test_patches_lie_where_tiles_show_them_and_windows_cover_the_same_part_in_all(tiled: Any) -> None:
    found = {}
    for aspect in ("anyres", "anyres_max_9"):
        model = tiled(aspect)
        processor = model.get_vision_tower().image_processor
        for size in SIZES:
            pixels = looked_at(model, size)["images"]
            grid = patch_grid(size, 16 * pixels.shape[1], pixels.shape[1], model, processor)
            assert grid.box == (0, 0, *size)
            found[aspect, size] = grid, window_numbers(grid, 1, size, pixels, model)
    for size in SIZES:
        (one, windows), (other, again) = found["anyres", size], found["anyres_max_9", size]
        assert one == other and torch.equal(windows, again) and windows.shape[1] > 1


@pytest.mark.parametrize(("aspect", "merge"), [("anyres_max_9", "spatial_unpad_nobase"), ("highres", "spatial_unpad")])
def test_tiles_of_which_none_is_known_to_show_the_whole_image_are_refused(tiled: Any, aspect: str, merge: str) -> None:
    model = tiled(aspect, merge)
    with pytest.raises(SteeringError, match=f"{aspect}.*{merge}.*cannot be shown on the image"):
        patch_grid((56, 56), 80, 5, model, model.get_vision_tower().image_processor)
