"""VQAv2, OK-VQA, TextVQA and VizWiz: free questions, each with the answers of ten annotators.

The answer that is learned is the one that most annotators gave, as in LLaVA-1.5's training data (arXiv 2310.03744).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_steering_plugin.evaluation.layouts.entry import SHORT, UNANSWERABLE, Entry, asked, file_name, most_common
from llava_steering_plugin.evaluation.official_files import keyed, official, read_json, reading, text_of

COCO = {"train": "train2014", "val": "val2014", "test": "test2015"}


def vqav2(source: Path, split: str) -> Iterator[Entry]:
    """Yield VQAv2's questions about COCO's images in train2014, val2014 and test2015."""
    yield from _vqa(source, split, "v2_")


def okvqa(source: Path, split: str) -> Iterator[Entry]:
    """Yield OK-VQA's questions about COCO's images in train2014 and val2014."""
    yield from _vqa(source, split, "")


def _vqa(source: Path, split: str, prefix: str) -> Iterator[Entry]:
    part = COCO[split]
    path = official(source, f"{prefix}OpenEnded_mscoco_{part}_questions.json")
    questions = read_json(path, dict, 'an object with "questions"')
    answers: dict[str, str] | None = None
    if split != "test":
        answers_path = official(source, f"{prefix}mscoco_{part}_annotations.json")
        annotations = read_json(answers_path, dict, 'an object with "annotations"')
        with reading(answers_path):
            pairs = ((each["question_id"], _said(each)) for each in annotations["annotations"])
            answers = keyed(answers_path, pairs)
    with reading(path):
        for question in questions["questions"]:
            key = question["question_id"]
            if answers is not None and str(key) not in answers:
                raise ValueError(f"question {key} has no annotation")
            image = f"{part}/COCO_{part}_{int(question['image_id']):012d}.jpg"
            said = None if answers is None else answers[str(key)]
            yield Entry(key, asked(text_of(question, "question"), SHORT), said, image)


def _said(annotation: Mapping[str, Any]) -> str:
    return most_common(text_of(answer, "answer") for answer in annotation["answers"])


def textvqa(source: Path, split: str) -> Iterator[Entry]:
    """Yield TextVQA's questions about images in train_images (also of val) and test_images; no OCR tokens are given."""
    path = official(source, f"TextVQA_0.5.1_{split}.json")
    folder = "test_images" if split == "test" else "train_images"
    held = read_json(path, dict, 'an object with "data"')
    with reading(path):
        for entry in held["data"]:
            said = None if split == "test" else most_common(str(answer) for answer in entry["answers"])
            image = f"{folder}/{file_name(entry['image_id'])}.jpg"
            yield Entry(entry["question_id"], asked(text_of(entry, "question"), SHORT), said, image)


def vizwiz(source: Path, split: str) -> Iterator[Entry]:
    """Yield VizWiz' questions about images in train, val and test."""
    path = official(source, f"{split}.json", f"Annotations/{split}.json", f"annotations/{split}.json")
    entries = read_json(path, list, "a list of questions")
    with reading(path):
        for entry in entries:
            said = None if split == "test" else _said(entry)
            image = file_name(entry["image"])
            question = asked(text_of(entry, "question"), UNANSWERABLE, SHORT)
            yield Entry(image, question, said, f"{split}/{image}")
