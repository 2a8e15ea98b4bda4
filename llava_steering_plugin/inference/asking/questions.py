"""Reads question files, and checks that what they name is there.

A line is one of upstream's `question.jsonl`. Unlike there, it may name an adapter and several images.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_steering_plugin.errors import ArgumentsError, listing, shortened
from llava_steering_plugin.foreign_files import parse_json
from llava_steering_plugin.pool.pool import BASE

IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Question:
    """One line of a question file.

    Attributes:
        id: its `question_id`, of any type.
        text: with as many marks as images, or with none.
        images: names of files in the folder of images, in the order of their marks.
        adapter: the adapter that is asked.
    """

    id: Any
    text: str
    images: tuple[str, ...]
    adapter: str


def read_questions(path: Path, adapter: str = BASE) -> list[Question]:
    """Read a file of questions, one JSON object a line.

    Args:
        adapter: the adapter for lines that name none.

    Raises:
        ArgumentsError: the file cannot be read, or lines in it are no questions; the message lists them all.
    """
    try:
        # At line feeds only, as LLaVA does: JSON may hold other characters that end lines for str.splitlines().
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise ArgumentsError(f"the questions in {path} cannot be read: {error}") from error
    questions, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            given = parse_json(line)
        except ValueError as error:
            problems.append(f"line {number} is not valid JSON: {error}")
            continue
        if not isinstance(given, dict) or "question_id" not in given or not isinstance(given.get("text"), str):
            problems.append(f"line {number} lacks question_id or text")
            continue
        images = _images(given.get("image"))
        if found := _mistakes(given, images):
            problems += [f"line {number}{mistake}" for mistake in found]
            continue
        questions.append(Question(given["question_id"], given["text"], images or (), given.get("adapter", adapter)))
    if problems:
        raise ArgumentsError(listing(f"{path} is not a file of questions", shortened(problems)))
    return questions


def _images(named: Any) -> tuple[str, ...] | None:
    """Return the images that a line names: a string, a list of strings, or nothing; None if it names them otherwise."""
    if named is None:
        return ()
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


def _mistakes(given: Mapping[str, Any], images: tuple[str, ...] | None) -> list[str]:
    """Return all that is wrong with a line that has an id and a text, each to be read after the line's number."""
    found = []
    if not isinstance(given.get("adapter", ""), str):
        found.append(": adapter must be a string")
    if images is None:
        found.append(": image must be the name of a file, or a list of at least one")
    if not _is_text(given["text"]):
        found.append(" has half a character (\\ud800 to \\udfff) in its text")
    marks = given["text"].count(IMAGE_MARK)
    if images is not None and marks not in (0, len(images)):
        found.append(
            f" has {marks} {IMAGE_MARK} in its text and names {len(images) or 'no'} image{'s' * (len(images) != 1)}; "
            "write one for each image, or none: then all are put in front"
        )
    return found


def _is_text(value: str) -> bool:
    """Tell whether no character is half of one, which JSON can write and no tokenizer takes."""
    try:
        return value.encode() is not None
    except UnicodeEncodeError:
        return False


def check_questions(questions: Sequence[Question], adapters: Collection[str], images: Path) -> None:
    """Check that the image and the adapter of every question exist.

    Args:
        adapters: the names of all adapters.
        images: the folder of the images.

    Raises:
        ArgumentsError: some do not; the message lists them, or the first ones of many.
    """
    problems = [
        f"there is no adapter {name!r}: give it with --adapter {name}=PATH; known: {', '.join(adapters)}"
        for name in sorted({each.adapter for each in questions} - set(adapters))
    ]
    named = sorted({image for each in questions for image in each.images})
    if named and not images.is_dir():
        problems.append(f"there is no folder {images}, where their images should be")
    else:
        problems += [f"there is no image {name}" for name in named if not os.path.isfile(images / name)]
    if problems:
        raise ArgumentsError(listing(f"some questions cannot be asked (images from {images})", shortened(problems)))
