"""Write easy-VQA as LLaVA's data: captions, questions, and the pictures through a camera with permuted colours."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import easy_vqa
import numpy as np
from PIL import Image

from experiments.settings import CAMERA, SEED, TURNS

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
KINDS = ("colour", "shape", "yes/no")


@dataclass(frozen=True)
class Question:
    """One question about one picture, with its answer and its kind."""

    image: int
    text: str
    answer: str

    @property
    def kind(self) -> str:
        return "colour" if self.answer in COLOURS else "shape" if self.answer in SHAPES else "yes/no"


@dataclass(frozen=True)
class Split:
    """The pictures and questions of easy-VQA's train or test split."""

    name: str
    questions: tuple[Question, ...]
    pictures: dict[int, Path]

    @classmethod
    def load(cls, name: str) -> Split:
        get = easy_vqa.get_train_questions if name == "train" else easy_vqa.get_test_questions
        paths = easy_vqa.get_train_image_paths if name == "train" else easy_vqa.get_test_image_paths
        questions = tuple(Question(image, text, answer) for text, answer, image in zip(*get(), strict=True))
        return cls(name, questions, {number: Path(path) for number, path in sorted(paths().items())})


def seen_in(questions: Sequence[Question]) -> dict[int, tuple[str | None, str | None]]:
    """Return colour and shape of every picture, as far as its questions and answers name them."""
    known: dict[int, tuple[str | None, str | None]] = {}
    for question in questions:
        colour, shape = known.get(question.image, (None, None))
        if question.kind == "colour":
            colour, shape = question.answer, next((word for word in SHAPES if word in question.text), shape)
        elif question.kind == "shape":
            shape, colour = question.answer, next((word for word in COLOURS if word in question.text), colour)
        known[question.image] = (colour, shape)
    return known


def permuted(picture: Image.Image, order: Sequence[int] = CAMERA) -> Image.Image:
    """Return the picture with another order of colour channels: channel k is the original's order[k]."""
    return Image.fromarray(np.asarray(picture.convert("RGB"))[..., list(order)])


def test_sample(questions: Sequence[Question], count: int, seed: int = SEED) -> list[Question]:
    """Return `count` questions, a third of each kind, at most one of a kind for each picture."""
    rng = random.Random(seed)
    sample = []
    for kind in KINDS:
        by_picture: dict[int, list[Question]] = {}
        for question in questions:
            if question.kind == kind:
                by_picture.setdefault(question.image, []).append(question)
        for picture in rng.sample(sorted(by_picture), count // len(KINDS)):
            sample.append(rng.choice(by_picture[picture]))
    return sample


def halves(questions: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """Return the questions about pictures of odd numbers, for validation, and of even ones, for the test."""
    return [one for one in questions if one.image % 2], [one for one in questions if not one.image % 2]


def sentences() -> Iterator[str]:
    """Yield the texts for the tokenizer: all that occur, the system prompt often enough to become whole words."""
    from llava.conversation import conv_templates

    template = conv_templates["v1"]
    for question in Split.load("train").questions:
        yield question.text
        yield f"{template.roles[0]}: {question.text} {template.roles[1]}: {question.answer}"
    for colour in COLOURS:
        for shape in SHAPES:
            yield f"a {colour} {shape}"
    for _ in range(2000):
        yield template.system


def write(folder: Path) -> None:
    """Write pictures/ (both cameras), captions.json and train.json into `folder`."""
    train, test = Split.load("train"), Split.load("test")
    for split in (train, test):
        for camera, seen in (("clean", lambda picture: picture), ("shifted", permuted)):
            target = folder / "pictures" / camera / split.name
            target.mkdir(parents=True, exist_ok=True)
            for number, path in split.pictures.items():
                seen(Image.open(path).convert("RGB")).save(target / f"{number}.png")
    captions = [
        conversation(f"caption-{number}", f"train/{number}.png", "<image>", f"a {colour} {shape}")
        for number, (colour, shape) in sorted(seen_in(train.questions).items())
        if colour and shape
    ]
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "train.json").write_text(json.dumps(conversations(train.questions)))


def conversations(questions: Sequence[Question], turns: int = TURNS, seed: int = SEED) -> list[dict[str, Any]]:
    """Return all questions in conversations about one picture, of at most `turns` questions each, in random order."""
    rng = random.Random(seed)
    by_picture: dict[int, list[Question]] = {}
    for question in questions:
        by_picture.setdefault(question.image, []).append(question)
    samples = []
    for picture, asked in sorted(by_picture.items()):
        rng.shuffle(asked)
        for start in range(0, len(asked), turns):
            first, *more = asked[start : start + turns]
            sample = conversation(
                f"picture-{picture}-{start}", f"train/{picture}.png", f"<image>\n{first.text}", first.answer
            )
            for question in more:
                sample["conversations"] += _turn(question.text, question.answer)
            samples.append(sample)
    return samples


def conversation(identity: str, image: str, prompt: str, answer: str) -> dict[str, Any]:
    """Return a conversation of one turn, in LLaVA's format."""
    return {"id": identity, "image": image, "conversations": _turn(prompt, answer)}


def _turn(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
