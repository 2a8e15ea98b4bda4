"""Describe where a training's samples come from, and refuse what LLaVA cannot be trained on, by name."""

from __future__ import annotations

import copy
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llava_steering_plugin.errors import DataError, listing
from llava_steering_plugin.training.data.sample_checks import Defect, SampleChecks, name_of

# Attribute of LLaVA's dataset that holds its `DataSource`.
SOURCE = "steering_source"
NO_SAMPLES = "{} holds no samples."
ADVICE = (
    "Mend or remove it, or give --skip_bad_samples: other samples then take the places of bad ones.\n"
    "All of them at once, before a training: {}"
)


@dataclass(frozen=True)
class DataSource:
    """Says where samples come from.

    Attributes:
        path: the data file.
        checks: what they are checked for.
        version: of LLaVA's conversation templates, as --version names it; None: unknown.
    """

    path: str
    checks: SampleChecks
    version: str | None = None

    def command(self) -> str:
        """Return the command that checks the whole file."""
        words = ["llava-steering", "check-data", self.path]
        if self.checks.image_folder is not None:
            words += ["--image-folder", self.checks.image_folder]
        if not self.checks.padded:
            words += ["--image_aspect_ratio", "square"]
        if self.checks.several:
            words += ["--several-images"]
        if self.checks.video_folder is not None:
            words += ["--video-folder", self.checks.video_folder]
        return shlex.join(words + (["--version", self.version] if self.version else []))


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Name the data file in errors of the block that reads it.

    Raises:
        DataError: it is missing, or no JSON.
    """
    try:
        yield
    except json.JSONDecodeError as error:
        raise DataError(f"the training data in {path} is no JSON: {error}.{lines_hint(error.msg)}") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error) or type(error).__name__
        raise DataError(f"the training data in {path} cannot be read: {reason}.") from error


def lines_hint(message: str) -> str:
    """Return what to do if JSON ends before the file does."""
    return " Is it JSON Lines? LLaVA reads one list, [...]." if message.startswith("Extra data") else ""


def check_entries(entries: Any, source: DataSource, *, images_work: bool) -> None:
    """Check what all entries of a data file have in common.

    Args:
        entries: what the file holds.
        images_work: the training has a vision tower.

    Raises:
        DataError: they are no list of samples, or name images and flags for images are missing.
    """
    if not isinstance(entries, list):
        raise DataError(no_list(source.path, entries))
    if not entries:
        raise DataError(NO_SAMPLES.format(source.path))
    pictured = next((n for n, entry in enumerate(entries) if isinstance(entry, Mapping) and "image" in entry), None)
    missing = [
        flag
        for flag, given in (("--image_folder", source.checks.image_folder is not None), ("--vision_tower", images_work))
        if not given
    ]
    if pictured is not None and missing:
        name = name_of(pictured, entries[pictured])
        raise DataError(f"{name} of {source.path} has an image, and the flags lack {' and '.join(missing)}.")


def refuse_bad_entries(entries: Sequence[Any], source: DataSource) -> None:
    """Look at all entries of a data file, at no picture.

    Raises:
        DataError: LLaVA cannot be trained on one. The message names the first one, and counts the others.
    """
    check = source.checks.structure
    bad = [number for number, entry in enumerate(entries) if check(entry)]
    if bad:
        entry = entries[bad[0]]
        raise DataError(refusal(source, bad[0], entry, source.checks.of(entry, whole=True), len(bad) - 1))


def no_list(path: str, found: Any) -> str:
    """Return the message for a data file that holds something else than a list of samples."""
    kind = "an object" if isinstance(found, dict) else f"{type(found).__name__}"
    return f"{path} holds {kind} at its top level; LLaVA reads a list of samples, [...]."


def refusal(source: DataSource | None, number: int, entry: Any, defects: Sequence[Defect], others: int = 0) -> str:
    """Return the message for a sample that LLaVA cannot be trained on.

    Args:
        entry: of the data file.
        others: how many more there are, as far as is known.
    """
    where = name_of(number, entry) + (f" of {source.path}" if source is not None else "")
    more = f" ({others} more are bad)" if others else ""
    text = listing(f"LLaVA cannot be trained on {where}{more}", [defect.reason for defect in defects])
    return text if source is None else f"{text}\n{ADVICE.format(source.command())}"


def failure(error: Exception) -> str:
    """Return the reason of a sample that no check finds bad and that LLaVA fails on all the same."""
    lines = str(error).strip().splitlines()
    return f"LLaVA fails on it: {type(error).__name__}" + (f": {lines[0]}" if lines else "")


def with_sound_entries(dataset: Any) -> Any:
    """Return LLaVA's dataset, or a copy in which entries whose length it could not tell have one word."""
    entries = dataset.list_data_dict
    sound = [entry if _has_length(entry) else _one_word(entry) for entry in entries]
    if all(new is old for new, old in zip(sound, entries, strict=True)):
        return dataset
    copied = copy.copy(dataset)
    copied.list_data_dict = sound
    return copied


def _has_length(entry: Any) -> bool:
    try:
        return any(turn["value"].split() for turn in entry["conversations"]) and all(
            isinstance(turn["value"], str) for turn in entry["conversations"]
        )
    except (AttributeError, LookupError, TypeError):
        return False


def _one_word(entry: Any) -> dict[str, Any]:
    picture = {"image": ""} if isinstance(entry, Mapping) and "image" in entry else {}
    return {"conversations": [{"value": "word"}], **picture}


def early_problem(path: str | None) -> list[str]:
    """Return what a glance at a data file shows, before a model is loaded."""
    if not path:
        return ["--data_path is not given"]
    try:
        if not os.path.exists(path):
            return [f"--data_path: there is no file {path}"]
        if os.path.isdir(path):
            return [f"--data_path {path} is a folder, and should be a JSON file"]
        if os.path.isfile(path):  # a pipe can be read only once
            with open(path, "rb") as file:
                if not file.read(1 << 16).strip():
                    return [f"--data_path {path} is an empty file"]
    except (OSError, ValueError) as error:
        return [f"--data_path {path} cannot be read: {getattr(error, 'strerror', None) or error}"]
    return []
