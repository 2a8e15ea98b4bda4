"""Tasks that pull against each other, as LLaVA's data: several cameras, shapes, yes/no, digits.

A camera is an order of colour channels. Questions about colours name the camera, and the answer is the true colour: the
same pixels have different answers under different cameras.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import world
from PIL import Image
from settings import IMAGE_SIDE, SEED

CAMERAS = {"a": (0, 1, 2), "b": (2, 0, 1), "c": (1, 2, 0)}
COLOUR_TASKS = tuple(f"colour {camera}" for camera in CAMERAS)
TASKS = (*COLOUR_TASKS, "shape", "yes/no", "digit")
# The first of scikit-learn's digits are trained on; these come last and are asked about.
HELD_OUT_DIGITS = 497
DIGIT_QUESTION = "what digit is this?"


@dataclass(frozen=True)
class Asked:
    """One question with its picture (a path below the picture folder), its answer and the task it belongs to."""

    task: str
    image: str
    text: str
    answer: str


def under_camera(question: world.Question, camera: str, split: str) -> Asked:
    """A colour question about a picture that this camera took."""
    return Asked(
        f"colour {camera}",
        f"{camera}/{split}/{question.image}.png",
        f"camera {camera}: {question.text}",
        question.answer,
    )


def with_clean_camera(question: world.Question, split: str) -> Asked:
    """A question about shapes, or a yes/no question, as it stands in easy-VQA."""
    return Asked(question.kind, f"a/{split}/{question.image}.png", question.text, question.answer)


def training(questions: Sequence[world.Question], digits: Sequence[int], count: int, seed: int = SEED) -> list[Asked]:
    """`count` questions of every task, task by task; each camera sees pictures of its own choice.

    Args:
        questions: easy-VQA's.
        digits: the digit on each picture of one, in order.
    """
    rng = random.Random(seed)
    of_kind = {kind: [question for question in questions if question.kind == kind] for kind in world.KINDS}
    asked = [
        under_camera(question, camera, "train")
        for camera in CAMERAS
        for question in _drawn(rng, of_kind["colour"], count)
    ]
    for kind in ("shape", "yes/no"):
        asked += [with_clean_camera(question, "train") for question in _drawn(rng, of_kind[kind], count)]
    return asked + [_digit(place, digits[place]) for place in _drawn(rng, range(len(digits)), count)]


def testing(
    questions: Sequence[world.Question], digits: Sequence[int], first: int, count: int, seed: int = SEED
) -> list[Asked]:
    """`count` questions of every task, task by task; all cameras see the same pictures.

    Args:
        questions: easy-VQA's.
        digits: the digit on each picture of one, from number `first` on.
    """
    sample = world.test_sample(questions, count * len(world.KINDS), seed)
    asked = [
        under_camera(question, camera, "test") for camera in CAMERAS for question in sample if question.kind == "colour"
    ]
    for kind in ("shape", "yes/no"):
        asked += [with_clean_camera(question, "test") for question in sample if question.kind == kind]
    places = random.Random(seed).sample(range(len(digits)), count)
    return asked + [_digit(first + place, digits[place]) for place in places]


def _drawn(rng: random.Random, pool: Sequence, count: int) -> list:
    """`count` of the pool; none twice before all were drawn once."""
    whole, rest = divmod(count, len(pool))
    return [*list(pool) * whole, *rng.sample(pool, rest)]


def _digit(number: int, digit: int) -> Asked:
    return Asked("digit", f"digits/{number}.png", DIGIT_QUESTION, str(digit))


def digit_picture(values: np.ndarray) -> Image.Image:
    """scikit-learn's 8 x 8 digit, 0 to 16, as a grey picture of the size that the vision tower takes."""
    grey = Image.fromarray((values * (255 / 16)).round().astype(np.uint8))
    return grey.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC).convert("RGB")


def write(folder: Path, samples: int, questions: int) -> None:
    """Writes pictures/, train.json, questions.jsonl and answers.json (in the order of the questions) into `folder`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    splits = {name: world.Split.load(name) for name in ("train", "test")}
    first = len(digits.target) - HELD_OUT_DIGITS
    trained = training(splits["train"].questions, digits.target[:first].tolist(), samples)
    tested = testing(splits["test"].questions, digits.target[first:].tolist(), first, questions)
    for image in sorted({asked.image for asked in (*trained, *tested)}):
        target = folder / "pictures" / image
        target.parent.mkdir(parents=True, exist_ok=True)
        _picture(image, splits, digits.images).save(target)
    samples_of = [
        world.conversation(f"question-{place}", asked.image, f"<image>\n{asked.text}", asked.answer)
        for place, asked in enumerate(trained)
    ]
    (folder / "train.json").write_text(json.dumps(samples_of))
    with (folder / "questions.jsonl").open("w") as lines:
        for place, asked in enumerate(tested):
            lines.write(json.dumps({"question_id": place, "image": asked.image, "text": asked.text}) + "\n")
    (folder / "answers.json").write_text(json.dumps([{"answer": asked.answer, "kind": asked.task} for asked in tested]))


def _picture(image: str, splits: Mapping[str, world.Split], digits: np.ndarray) -> Image.Image:
    path = Path(image)
    if path.parts[0] == "digits":
        return digit_picture(digits[int(path.stem)])
    camera, split = path.parts[:2]
    return world.permuted(Image.open(splits[split].pictures[int(path.stem)]), CAMERAS[camera])
