"""Decodes the images of requests."""

from __future__ import annotations

import io

from PIL import Image

# Formats that PIL may recognise in an upload. Not all that it knows: some of them start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def decode_image(data: bytes) -> Image.Image:
    """Return the image in a file, in RGB: padding has a colour of three values, which other modes cannot hold."""
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    image.load()  # before looking at its mode, which decoders may change
    return image if image.mode == "RGB" else image.convert("RGB")
