"""Images that are asked about: read from files, and as upstream's programs hand them to a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from llava_steering_plugin.errors import ArgumentsError


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """The image in a file, in RGB.

    Raises:
        ArgumentsError: no such file, or none that can be read as an image.
    """
    try:
        with Image.open(path) as file:
            image: Image.Image = file.convert("RGB")
            return image
    except FileNotFoundError as error:
        raise ArgumentsError(f"there is no file {path}.") from error
    except Exception as error:  # decoders raise what they like on a damaged file
        reason = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
        raise ArgumentsError(f"{path} is no image that can be read, or damaged{reason}.") from error


def image_arguments(pictures: Sequence[Image.Image], processor: Any, model: Any) -> dict[str, Any]:
    """The arguments of `generate` that bring pictures to a LLaVA of `load_pretrained_model`.

    In half precision, as all of upstream's programs send them: the projector is in it, and the vision tower answers in
    the precision of its images. Its own differs, by where it was loaded.

    Args:
        processor: the image processor that `load_pretrained_model` gave with the model.
    """
    from llava.mm_utils import process_images

    half = {"device": model.device, "dtype": torch.float16}
    pixels = process_images(pictures, processor, model.config)
    images = [each.to(**half) for each in pixels] if isinstance(pixels, list) else pixels.to(**half)
    return {"images": images, "image_sizes": [picture.size for picture in pictures]}
