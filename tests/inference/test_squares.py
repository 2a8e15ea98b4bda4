"""Large pictures reach the vision tower as LLaVA's own code prepares them, to the bit, without its large squares."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llava_steering_plugin.inference.squares import ROWS, process_images, shrunk_square, side_of

pytestmark = pytest.mark.usefixtures("patched_llava")

SIZES = [(301, 80), (80, 301), (90, 89), (57, 56), (40, 30), (200, 200), (7, 2000), (1111, 3), (64, ROWS * 2 + 5)]


def noise(size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def processor(request: pytest.FixtureRequest) -> Any:
    from transformers import CLIPImageProcessor

    if request.param == "clip":
        return CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    # As SigLIP's processor, which the pinned transformers lacks: both sides given, nothing cropped.
    return CLIPImageProcessor(size={"height": 56, "width": 56}, do_center_crop=False, image_mean=[0.5, 0.5, 0.5])


# Without padding, a processor that crops nothing makes pictures of several shapes, which LLaVA does not stack.
@pytest.mark.parametrize(
    ("processor", "ratio"), [("clip", "pad"), ("clip", "square"), ("siglip", "pad")], indirect=["processor"]
)
def test_pixels_are_equal_to_the_bit(processor: Any, ratio: str) -> None:
    from llava.mm_utils import process_images as upstreams

    config = SimpleNamespace(image_aspect_ratio=ratio)
    for size in SIZES if ratio == "pad" else SIZES[:3]:
        picture = noise(size)
        assert torch.equal(process_images([picture], processor, config), upstreams([picture], processor, config)), size


@pytest.mark.parametrize("size", [(12_640, 3_160), (3_160, 12_640)])
def test_a_picture_of_40_million_pixels_takes_a_moment(size: tuple[int, int]) -> None:
    """It took 10 s, for a square of 160 million."""
    picture = Image.new("RGB", size, "red")
    started = time.process_time()
    square = shrunk_square(picture, 336, Image.Resampling.BICUBIC, (1, 2, 3))
    assert time.process_time() - started < 6
    assert square.size == (336, 336)
    assert square.getpixel((168, 168)) == (255, 0, 0) and square.getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize(
    ("size", "side"),
    [({"shortest_edge": 56}, 56), ({"height": 56, "width": 56}, 56), ((56, 56), 56), ({"height": 5, "width": 6}, None)],
)
def test_the_side_is_read_in_every_form_that_processors_have(size: Any, side: int | None) -> None:
    assert side_of(SimpleNamespace(size=size, resample=3)) == side
    assert side_of(SimpleNamespace(size=size)) is None
    assert side_of(SimpleNamespace(size=size, resample=3, do_resize=False)) is None
