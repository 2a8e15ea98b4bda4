"""Patches lie where LLaVA's own preprocessing puts them: found by one bright spot (`inference/patch_grid.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from steered import load_llava
from tiny_llava import IMAGE_SIDE, VISUAL_TOKENS, TinyLlava

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.inference.images import image_arguments
from llava_steering_plugin.inference.patch_grid import (
    PatchGrid,
    chosen_window,
    over_patches,
    patch_grid,
    window_numbers,
    windows_of,
)

PINPOINTS = [[112, 56], [56, 112], [112, 112], [168, 56]]
SIZES = [(56, 56), (120, 56), (40, 72), (301, 200), (33, 190)]


@pytest.fixture(scope="module")
def model(tiny: TinyLlava, patched_llava: Path) -> Any:
    return load_llava(tiny.llava, image_grid_pinpoints=PINPOINTS)


def spot(size: tuple[int, int], place: tuple[float, float]) -> tuple[Image.Image, tuple[float, float]]:
    """A black image with a white spot, and the middle of the spot in pixels."""
    image = Image.new("RGB", size)
    side = max(min(size) // 4, 1)
    x, y = (int(part * (length - side)) for part, length in zip(place, size, strict=True))
    image.paste((255, 255, 255), (x, y, x + side, y + side))
    return image, (x + side / 2, y + side / 2)


def middle(tile: torch.Tensor) -> tuple[float, float]:
    """The middle of what is white in a tile [3, H, W], as fractions of its sides; padding is grey at most."""
    light = (tile.float().min(0).values - 1.0).clamp(min=0)
    height, width = light.shape
    x = (light.sum(0) * (torch.arange(width) + 0.5)).sum() / light.sum() / width
    y = (light.sum(1) * (torch.arange(height) + 0.5)).sum() / light.sum() / height
    return float(x), float(y)


# Corners, but where the middle is cut out of the image: there the spot must be in it.
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("ratio", "place"),
    [("pad", (0.0, 0.0)), ("pad", (1.0, 0.0)), ("pad", (0.2, 1.0)), ("square", (0.5, 0.55)), ("anyres", (1.0, 0.0))],
)
def test_the_box_says_where_a_spot_of_the_image_comes_out(
    model: Any, size: tuple[int, int], ratio: str, place: tuple[float, float]
) -> None:
    processor = model.get_vision_tower().image_processor
    model.config.image_aspect_ratio = ratio
    image, (x, y) = spot(size, place)
    pixels = image_arguments([image], processor, model)["images"][0]
    tiles = len(pixels) if pixels.dim() == 4 else 1
    grid = patch_grid(size, VISUAL_TOKENS * tiles, tiles, model, processor)
    seen = middle(pixels[0] if pixels.dim() == 4 else pixels)
    left, top, right, bottom = grid.box
    pixel = max((right - left) / IMAGE_SIDE, (bottom - top) / IMAGE_SIDE)
    assert left + seen[0] * (right - left) == pytest.approx(x, abs=pixel)
    assert top + seen[1] * (bottom - top) == pytest.approx(y, abs=pixel)


def test_padding_lies_outside_of_the_image_and_cropping_inside(model: Any) -> None:
    processor = model.get_vision_tower().image_processor
    boxes = {}
    for ratio in ("pad", "square", "anyres"):
        model.config.image_aspect_ratio = ratio
        boxes[ratio] = patch_grid((120, 56), VISUAL_TOKENS, 1, model, processor).box
    assert boxes == {"pad": (0, -32, 120, 88), "square": (32, 0, 88, 56), "anyres": (0, 0, 120, 56)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", [(0.0, 0.0), (1.0, 0.0), (0.3, 1.0)])
def test_a_window_covers_the_same_part_of_the_image_in_every_tile(
    model: Any, size: tuple[int, int], place: tuple[float, float]
) -> None:
    processor = model.get_vision_tower().image_processor
    model.config.image_aspect_ratio = "anyres"
    image, (x, y) = spot(size, place)
    pixels = image_arguments([image], processor, model)["images"]
    grid = patch_grid(size, VISUAL_TOKENS * pixels.shape[1], pixels.shape[1], model, processor)
    numbers = window_numbers(grid, 1, size, pixels, model)
    assert numbers.shape == (1, pixels.shape[1], 1, IMAGE_SIDE, IMAGE_SIDE)
    # LLaVA pads the tiles in black, which is as dark as the image here; outside of it no number counts.
    expected = int(y / size[1] * grid.rows) * grid.columns + int(x / size[0] * grid.columns)
    bright = pixels[0, :, 1] > 2.0
    assert bright[0].any() and bright[1:].any()
    for found in (numbers[0, 0, 0][bright[0]], numbers[0, 1:, 0][bright[1:]]):
        # The spot may touch the edge of a patch; its middle is in the expected one, and so are most of its pixels.
        assert int(found.mode().values) == expected


def test_windows_of_several_patches_are_numbered_row_by_row_and_given_back_to_their_patches() -> None:
    grid = PatchGrid(3, 3, (0, 0, 1, 1), 0, 9)
    assert (windows_of(grid, 1), windows_of(grid, 2), windows_of(grid, 3)) == (9, 4, 1)
    numbers = window_numbers(grid, 2, (6, 6), torch.zeros(1, 3, 6, 6), None)
    assert numbers.shape == (1, 1, 6, 6)
    assert numbers[0, 0, :, 0].tolist() == [0, 0, 0, 0, 2, 2]
    assert numbers[0, 0, 5].tolist() == [2, 2, 2, 2, 3, 3]
    values = over_patches(grid, 2, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert values.tolist() == [[1, 1, 2], [1, 1, 2], [3, 3, 4]]
    assert (chosen_window(grid, 9), chosen_window(grid, 8), chosen_window(grid, 1)) == (1, 2, 3)


def test_the_class_token_is_passed_over_and_tokens_that_are_no_square_are_refused(model: Any) -> None:
    processor = model.get_vision_tower().image_processor
    model.config.image_aspect_ratio = "pad"
    assert patch_grid((56, 56), 4, 1, model, processor).rows == 2  # a projector that pools
    with pytest.raises(SteeringError, match=r"15 tokens in 1 tile\(s\), which are no square of patches"):
        patch_grid((56, 56), 15, 1, model, processor)
    with pytest.raises(SteeringError, match="12 tokens in 3"):
        patch_grid((56, 56), 12, 3, model, processor)
    model.config.mm_vision_select_feature = "cls_patch"
    try:
        assert patch_grid((56, 56), VISUAL_TOKENS + 1, 1, model, processor).first == 1
    finally:
        model.config.mm_vision_select_feature = "patch"
