"""Images are read from files and passed to a model as upstream's programs pass them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from steered import load_llava
from tiny_llava import TinyLlava

from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.inference.images import image_arguments, read_image


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_an_image_in_any_mode_is_read_in_rgb(mode: str, tmp_path: Path) -> None:
    Image.new("RGB", (4, 2), "red").convert(mode).save(tmp_path / "it.png")
    image = read_image(tmp_path / "it.png")
    assert (image.mode, image.size) == ("RGB", (4, 2))
    assert len(set(image.getdata())) == 1


def test_what_is_no_image_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    for name, said in (
        ("nowhere.png", "there is no file .*nowhere.png"),
        ("notes.txt", r"notes\.txt cannot be read as an image, or is damaged\.$"),
        (".", "cannot be read as an image, or is damaged: Is a directory"),
    ):
        with pytest.raises(ArgumentsError, match=said):
            read_image(tmp_path / name)


@pytest.mark.usefixtures("patched_llava")
@pytest.mark.parametrize("ratio", ["pad", "square"])
@pytest.mark.parametrize("precision", [torch.float16, torch.float32])
def test_pixels_are_in_the_projectors_precision_and_sizes_are_those_of_the_pictures(
    precision: torch.dtype, ratio: str, tiny: TinyLlava
) -> None:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    model = load_llava(tiny.llava, image_aspect_ratio=ratio).to(precision)
    model.get_vision_tower().float()  # its own precision does not count
    pictures = [Image.new("RGB", (80, 48), "red"), Image.new("RGB", (40, 40), "blue")]
    given = image_arguments(pictures, processor, model)
    assert given["images"].shape == (2, 3, 56, 56) and given["images"].dtype == precision
    assert given["image_sizes"] == [(80, 48), (40, 40)]
