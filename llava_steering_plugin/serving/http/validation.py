"""Checks all of a request before a model sees it: upstream's worker trusts what it gets."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from llava_steering_plugin.inference.images import like_channels
from llava_steering_plugin.serving.generation.images import FORMATS
from llava_steering_plugin.serving.generation.request import GenerationRequest
from llava_steering_plugin.serving.http.limits import Limits
from llava_steering_plugin.serving.http.protocol import Refused

IMAGE_TOKEN = "<image>"  # upstream's DEFAULT_IMAGE_TOKEN
STOP_CHARACTERS = 256
# Of upstream's worker: tokens of an answer that says no number, and of any.
DEFAULT_TOKENS, MOST_TOKENS = 256, 1024
# How many times the pixels of the largest image its square may have, and how many times as long as wide an image may
# be. This admits panoramas, but no file of a few bytes that is one pixel wide.
SQUARE, LONGEST = 4, 100


@dataclass(frozen=True)
class CheckedRequest:
    """A request that has passed all checks.

    Attributes:
        shown: the model's name on the page.
        prompt: its text.
        asked: the answer that it asks for.
    """

    shown: str
    prompt: str
    asked: GenerationRequest

    def __str__(self) -> str:
        """Return a line for the log: the size of the request, nothing of its content."""
        return f"{self.shown}: {len(self.prompt)} characters, {len(self.asked.images)} image(s)"


def check_request(
    data: dict[str, Any], limits: Limits, find: Callable[[str], str | None], multimodal: bool
) -> CheckedRequest:
    """Check every field, and every image by decoding it. Large images take a while: do not call it in an event loop.

    Args:
        data: the request.
        find: returns the pool's name of a model on the page, None for an unknown one.
        multimodal: whether the model takes images.

    Raises:
        Refused: missing or mistyped fields (422, all listed), an unknown model (404), a prompt that is too long (413),
            images that are damaged, too many or too large, or do not match the prompt (400).
    """
    problems = [problem for key, check in _CHECKS.items() if (problem := check(key, data.get(key)))]
    if problems:
        raise Refused(422, "The request cannot be answered: " + "; ".join(problems) + ".")
    prompt, images = data["prompt"], data.get("images") or []
    if len(prompt) > limits.prompt_characters:
        raise Refused(413, f"The prompt is longer than {limits.prompt_characters:,} characters.")
    adapter = find(data["model"])
    if adapter is None:
        raise Refused(404, "There is no model of that name here. Reload the page for the list.")
    marks = prompt.count(IMAGE_TOKEN)
    if images and not multimodal:
        raise Refused(400, "This model takes no images.")
    if marks != len(images):
        raise Refused(400, f"The request has {len(images)} image(s) and its prompt {marks} {IMAGE_TOKEN} mark(s).")
    if len(images) > limits.images:
        raise Refused(400, f"The request has more than {limits.images} images.")
    given = {key: data[key] for key in ("temperature", "top_p") if data.get(key) is not None}
    asked = GenerationRequest(
        adapter=adapter,
        prompt=prompt,
        images=tuple(
            check_image(_decoded(image, number), number, limits) for number, image in enumerate(images, start=1)
        ),
        max_new_tokens=min(data.get("max_new_tokens") or DEFAULT_TOKENS, MOST_TOKENS),
        stop=(data["stop"],),
        **given,
    )
    return CheckedRequest(data["model"], prompt, asked)


def _decoded(text: str, number: int) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, f"Image {number} is not valid base64.") from error


def check_image(data: bytes, number: int, limits: Limits) -> bytes:
    """Check that an image is whole and not too large; return its file. It waits for its turn without its pixels.

    Args:
        number: of the image in its request, from 1.

    Raises:
        Refused: it is not (400).
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # Before decoding the pixels: a few bytes can stand for gigabytes.
            _check_size(image, number, limits)
            image.load()
    except Refused:
        raise
    except Image.DecompressionBombError as error:  # PIL's own limit, which comes before ours
        most = min(limits.image_pixels, 2 * (Image.MAX_IMAGE_PIXELS or limits.image_pixels))
        raise Refused(400, f"Image {number} has more than {most:,} pixels.") from error
    except Exception as error:  # decoders raise all kinds of errors on a damaged file
        known = ", ".join(FORMATS)
        raise Refused(400, f"Image {number} is damaged, cut off, or none of {known}.") from error
    return data


def _check_size(image: Image.Image, number: int, limits: Limits) -> None:
    """Check the size of an image as it is and as upstream makes it: padded to a square, or its short side enlarged.

    Raises:
        Refused: it is too large, or too small to be read (400).
    """
    short, long = sorted(image.size)
    if short * long > limits.image_pixels:
        raise Refused(400, f"Image {number} has more than {limits.image_pixels:,} pixels.")
    if long**2 > SQUARE * limits.image_pixels or long > LONGEST * short:
        most = math.isqrt(SQUARE * limits.image_pixels)
        raise Refused(
            400, f"Image {number} is longer than {most:,} pixels, or more than {LONGEST} times as long as wide."
        )
    if like_channels(*image.size):
        raise Refused(400, f"Image {number} has too few pixels: it needs at least 4 in height.")


def _text(key: str, value: Any) -> str | None:
    if not isinstance(value, str):
        return f"{key!r} is missing or not text"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{key!r} holds half a character"
    return None


def _stop(key: str, value: Any) -> str | None:
    if (problem := _text(key, value)) is None and not 0 < len(value) <= STOP_CHARACTERS:
        return f"{key!r} has to be 1 to {STOP_CHARACTERS} characters"
    return problem


def _images(key: str, value: Any) -> str | None:
    if value is None or (isinstance(value, list) and all(isinstance(image, str) for image in value)):
        return None
    return f"{key!r} is not a list of base64 texts"


def _number(least: float, most: float, kinds: tuple[type, ...] = (int, float)) -> Callable[[str, Any], str | None]:
    def check(key: str, value: Any) -> str | None:
        if value is None:
            return None  # upstream has a default
        # type(): True is an int too. NaN is not between anything.
        if type(value) not in kinds or not least <= value <= most:
            return f"{key!r} is not {'a whole number' if kinds == (int,) else 'a number'} from {least:,} to {most:,}"
        return None

    return check


_CHECKS: dict[str, Callable[[str, Any], str | None]] = {
    "model": _text,
    "prompt": _text,
    "stop": _stop,
    "images": _images,
    "temperature": _number(0, 100),
    "top_p": _number(0, 1),
    "max_new_tokens": _number(1, 1_000_000, (int,)),
}
