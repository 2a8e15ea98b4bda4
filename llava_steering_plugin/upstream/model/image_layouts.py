"""Refuses pictures that are to be cut in a way which the LLaVA that is installed does not know.

LLaVA's `process_images` crops a picture where it knows no better, without a word: an adapter that LLaVA-NeXT has
trained with `anyres_max_9` would see other pictures than in its training.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from llava_steering_plugin.components.picture_layouts import ASPECT, is_anyres
from llava_steering_plugin.upstream.seams import require

# Cropped by every LLaVA; what pads and what cuts into tiles stands in `process_images` by its name.
_CROPPED = (None, "square")


def unknown_layout(settings: Mapping[str, Any]) -> str:
    """Return why this LLaVA cannot cut pictures as a config.json says; "" if it can.

    Args:
        settings: of a LLaVA.
    """
    aspect = settings.get(ASPECT)
    if aspect in _CROPPED:
        return ""
    known = inspect.getsource(inspect.unwrap(require(import_module("llava.mm_utils"), "process_images")))
    # LLaVA-NeXT looks for "anyres_max" in anyres_max_9.
    names = {str(aspect), re.sub(r"_\d+$", "", str(aspect))}
    if any(f'"{name}"' in known or f"'{name}'" in known for name in names):
        return ""
    other = "; LLaVA-NeXT does" if is_anyres(aspect) or aspect in ("highres", "crop_split") else ""
    return f"{ASPECT} is {aspect!r}, and the LLaVA that is installed here does not know how to cut pictures so{other}"
