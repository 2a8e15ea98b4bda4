"""Reads images from files and prepares them for a model as upstream's programs do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import IO, Any

import torch
from PIL import Image

from llava_steering_plugin.adapters.fit.base_model import projector_of
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.hooks.families import SPLICE
from llava_steering_plugin.hooks.token_map import signature_of
from llava_steering_plugin.inference.squares import process_images
from llava_steering_plugin.training.data.sample_checks import misread


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Return the image in a file, in RGB.

    Raises:
        ArgumentsError: there is no such file, or it cannot be read as an image.
    """
    try:
        with Image.open(path) as file:
            image: Image.Image = file.convert("RGB")
    except FileNotFoundError as error:
        raise ArgumentsError(f"there is no file {path}.") from error
    except Exception as error:  # decoders raise all kinds of errors on a damaged file
        reason = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
        raise ArgumentsError(f"{path} cannot be read as an image, or is damaged{reason}.") from error
    return large_enough(image, path)


def large_enough(image: Image.Image, name: object) -> Image.Image:
    """Return an image, if it is no strip of one to three pixels that would be read as channels.

    Args:
        name: of the image, for the message.

    Raises:
        ArgumentsError: it is.
    """
    if like_channels(*image.size):
        raise ArgumentsError(f"{name} has {image.width} x {image.height} pixels, too few to be read as an image.")
    return image


def image_size(path: str | os.PathLike[str] | IO[bytes]) -> tuple[int, int]:
    """Return width and height of the image in a file, without reading its pixels.

    Raises:
        ArgumentsError: it cannot be read as an image.
    """
    try:
        with Image.open(path) as file:
            width, height = file.size
    except Exception as error:
        raise ArgumentsError(f"{path} cannot be read as an image, or is damaged.") from error
    return width, height


def like_channels(width: int, height: int) -> bool:
    """Return whether a picture is so small that it is misread, padded to a square or not."""
    return any(misread(width, height, padded=padded) for padded in (True, False))


def half_unless_full(model: Any) -> torch.dtype:
    """Return the precision of a LLaVA's images: half, as all of upstream's programs send them.

    Only where the projector is in float32, as it is where no loader of upstream's has made it half, they are too: the
    vision tower answers in the precision of its images.
    """
    found = projector_of(model)
    kinds = {each.dtype for each in found[1].parameters() if each.is_floating_point()} if found is not None else set()
    return torch.float32 if kinds == {torch.float32} else torch.float16


def image_arguments(pictures: Sequence[Image.Image], processor: Any, model: Any, config: Any = None) -> dict[str, Any]:
    """Return the arguments of `generate` that pass pictures to a LLaVA of `load_pretrained_model`.

    Args:
        processor: the image processor that `load_pretrained_model` returned with the model.
        config: says how images are cut; None: the model's.
    """
    half = {"device": model.device, "dtype": half_unless_full(model)}
    pixels = process_images(pictures, processor, model.config if config is None else config)
    images = [each.to(**half) for each in pixels] if isinstance(pixels, list) else pixels.to(**half)
    return {"images": images, "image_sizes": [each.size for each in pictures], **as_pictures(model, len(pictures))}


def as_pictures(model: Any, count: int) -> dict[str, list[str]]:
    """Return the argument that tells LLaVA-NeXT, which knows videos too, that it gets `count` pictures; LLaVA has none.

    LLaVA-NeXT drops rows without an entry, and takes more entries than rows.
    """
    return {"modalities": ["image"] * count} if "modalities" in signature_of(getattr(model, SPLICE)).parameters else {}
