"""Checks what `diagnose image` alone is told, before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from llava_steering_plugin.errors import ArgumentsError, Problems, nearest
from llava_steering_plugin.inference.asking.questions import IMAGE_MARK
from llava_steering_plugin.inference.images import read_image
from llava_steering_plugin.measures.effect import EFFECTS, NONE, OCCLUSION


def check_image(
    images: Sequence[Path],
    question: str,
    answer: str | None,
    effect: str,
    window: int | None,
    problems: Problems,
) -> None:
    """Check image, question, answer and the settings of the effect.

    Args:
        images: the files; one is measured.
        problems: gets the errors.
    """
    found = []
    if len(images) != 1:
        found.append(f"--image is given {len(images)} times, and one image is measured at a time.")
    for file in images:
        with problems.noted():
            read_image(file)
    for flag, text in (("--question", question), ("--answer", answer)):
        if text is not None and not text.strip():
            found.append(f"{flag} is empty. Write some text.")
    if IMAGE_MARK in question:
        found.append(f"--question has {IMAGE_MARK} in its text; leave it out, it is added.")
    if effect not in EFFECTS:
        found.append(f"--effect {effect}: {nearest(effect, EFFECTS)}Choose one of {', '.join(EFFECTS)}.")
    elif effect != NONE and find_spec("captum") is None:
        found.append(
            f"--effect {effect} needs captum: pip install -e '.[diagnostics]' in this plugin's folder. "
            "Without it, use --effect none."
        )
    elif window is not None and effect != OCCLUSION:
        found.append(f"--occlusion-window {window} has no use with --effect {effect}.")
    problems.errors.extend(map(ArgumentsError, found))
