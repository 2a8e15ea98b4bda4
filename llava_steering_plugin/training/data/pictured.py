"""Read which pictures a sample names: one for LLaVA; for LLaVA-NeXT also several, or a video."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

IMAGE, VIDEO = "image", "video"


def has_pictures(sample: Mapping[str, Any], *, several: bool) -> bool:
    """Return whether a sample has something in the place of each `<image>`.

    Args:
        several: LLaVA-NeXT reads the sample.
    """
    return IMAGE in sample or (several and VIDEO in sample)


def images_of(sample: Mapping[str, Any], *, several: bool) -> tuple[list[str], str]:
    """Return the images that a sample names, and what is wrong with how it does so; "" if nothing is.

    Args:
        several: they may be a list.
    """
    if IMAGE not in sample:
        return [], ""
    named = sample[IMAGE]
    if named is None:
        return [], "its `image` is null; take the key out of a sample without a picture"
    if isinstance(named, list) and not several:
        return [], f"its `image` is a list of {len(named)}; LLaVA trains on one picture a sample"
    names = named if isinstance(named, list) else [named]
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        where = "holds" if isinstance(named, list) else "is"
        return [], f"its `image` {where} {shown(wrong[0])}, and should be the path of a file"
    if not names or not all(names):
        return [], "its `image` is empty; take the key out of a sample without a picture"
    return names, ""


def marks_wanted(sample: Mapping[str, Any], *, several: bool) -> int:
    """Return how many `<image>` a sample's texts must have: one for each image, one for a video."""
    named = sample.get(IMAGE)
    return max(1, len(named)) if several and isinstance(named, list) else 1


def missing_video(sample: Mapping[str, Any], folder: str | None) -> str:
    """Return why the video of a sample cannot be read, "" if it has none that is wrong.

    Args:
        folder: of --video_folder.
    """
    if VIDEO not in sample or IMAGE in sample:  # LLaVA-NeXT then reads the image
        return ""
    named = sample[VIDEO]
    if not isinstance(named, str) or not named:
        return f"its `video` is {shown(named)}, and should be the path of a file or of a folder of frames"
    path = os.path.join(folder or "", named)
    return "" if os.path.exists(path) else f"there is no video {path if path.isprintable() else repr(path)}"


def shown(value: Any) -> str:
    """Return a value of JSON as a short text."""
    if value is None:
        return "null"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
