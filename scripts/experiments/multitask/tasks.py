"""Write tasks that conflict as LLaVA's data: several cameras, shapes, yes/no, digits.

A camera is an order of colour channels. Questions about colours name the camera, and the answer is the true colour: the
same pixels have different answers under different cameras.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from experiments import world
from experiments.scoring import Asked, write_questions
from experiments.settings import IMAGE_SIDE, SEED

T = TypeVar("T")

CAMERAS = {"a": (0, 1, 2), "b": (2, 0, 1), "c": (1, 2, 0)}
COLOUR_TASKS = tuple(f"colour {camera}" for camera in CAMERAS)
TASKS = (*COLOUR_TASKS, "shape", "yes/no", "digit")
# The last of scikit-learn's digits are for the test, the others for training.
HELD_OUT_DIGITS = 497
DIGIT_QUESTION = "what digit is this?"


def under_camera(question: world.Question, camera: str, split: str) -> Asked:
    """Return a colour question about a picture that this camera took."""
    picture = f"{camera}/{split}/{question.image}.png"
    return Asked(picture, f"camera {camera}: {question.text}", question.answer, f"colour {camera}")


def with_clean_camera(question: world.Question, split: str) -> Asked:
    """Return a question about shapes, or a yes/no question, as it stands in easy-VQA."""
    return Asked(f"a/{split}/{question.image}.png", question.text, question.answer, question.kind)


def training(questions: Sequence[world.Question], digits: Sequence[int], count: int, seed: int = SEED) -> list[Asked]:
    """Return `count` questions of every task, task by task; each camera sees other pictures.

    Args:
        questions: easy-VQA's.
        digits: the digit on each picture, in order.
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
    """Return `count` questions of every task, task by task; all cameras see the same pictures.

    Args:
        questions: easy-VQA's.
        digits: the digit on each picture, from number `first` on.
    """
    sample = world.test_sample(questions, count * len(world.KINDS), seed)
    asked = [
        under_camera(question, camera, "test") for camera in CAMERAS for question in sample if question.kind == "colour"
    ]
    for kind in ("shape", "yes/no"):
        asked += [with_clean_camera(question, "test") for question in sample if question.kind == kind]
    places = random.Random(seed).sample(range(len(digits)), count)
    return asked + [_digit(first + place, digits[place]) for place in places]


def _drawn(rng: random.Random, pool: Sequence[T], count: int) -> list[T]:
    """Draw `count` of the pool; none is drawn twice before all were drawn once."""
    whole, rest = divmod(count, len(pool))
    return [*list(pool) * whole, *rng.sample(pool, rest)]


def _digit(number: int, digit: int) -> Asked:
    return Asked(f"digits/{number}.png", DIGIT_QUESTION, str(digit), "digit")


def digit_picture(values: np.ndarray[Any, Any]) -> Image.Image:
    """Return scikit-learn's 8 x 8 digit, 0 to 16, as a grey picture of the vision tower's size."""
    grey = Image.fromarray((values * (255 / 16)).round().astype(np.uint8))
    return grey.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC).convert("RGB")


def question_file(task: str) -> str:
    """Return the name of the file of a task's test questions."""
    return f"test-{task.replace('/', '-').replace(' ', '-')}.jsonl"


def write(folder: Path, samples: int, questions: int, validation: int) -> None:
    """Write data of all tasks into `folder`.

    pictures/, train.json, validation.jsonl, test.jsonl, a file of each task's test questions, and held-out.json: the
    test questions with their answers, as training data. Samples name their task. No picture is in two of training,
    validation and test.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    splits = {name: world.Split.load(name) for name in ("train", "test")}
    first = len(digits.target) - HELD_OUT_DIGITS
    trained = training(splits["train"].questions, digits.target[:first].tolist(), samples)
    half = first + HELD_OUT_DIGITS // 2
    odd, even = world.halves(splits["test"].questions)
    validated = testing(odd, digits.target[first:half].tolist(), first, validation)
    tested = testing(even, digits.target[half:].tolist(), half, questions)
    for image in sorted({asked.image for asked in (*trained, *validated, *tested)}):
        target = folder / "pictures" / image
        target.parent.mkdir(parents=True, exist_ok=True)
        _picture(image, splits, digits.images).save(target)
    for name, asked_of in (("train", trained), ("held-out", tested)):
        (folder / f"{name}.json").write_text(json.dumps(list(map(_sample, range(len(asked_of)), asked_of))))
    write_questions(folder / "validation.jsonl", validated)
    write_questions(folder / "test.jsonl", tested)
    for task in TASKS:
        write_questions(folder / question_file(task), (asked for asked in tested if asked.kind == task))


def _sample(number: int, asked: Asked) -> dict[str, Any]:
    """Return a question as a sample of LLaVA's training data."""
    sample = world.conversation(f"question-{number}", asked.image, f"<image>\n{asked.text}", asked.answer)
    return {**sample, "task": asked.kind}


def _picture(image: str, splits: Mapping[str, world.Split], digits: np.ndarray[Any, Any]) -> Image.Image:
    path = Path(image)
    if path.parts[0] == "digits":
        return digit_picture(digits[int(path.stem)])
    camera, split = path.parts[:2]
    return world.permuted(Image.open(splits[split].pictures[int(path.stem)]), CAMERAS[camera])
