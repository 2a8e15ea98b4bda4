"""Flickr30k's captions, and Vision-Flan, which is released in LLaVA's layout already."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llava_steering_plugin.evaluation.layouts.entry import IMAGE, Entry, asked, file_name
from llava_steering_plugin.evaluation.official_files import official, read_json, reading, text_of

VISION_FLAN_IMAGES = ("images_191task_1k", "image_191-task_1k", "images")
CAPTION = "Provide a one-sentence caption for the provided image."


def flickr30k(source: Path, split: str) -> Iterator[Entry]:
    """Yield Flickr30k's images in flickr30k-images, by Karpathy's splits; the first caption is learned."""
    path = official(source, "dataset_flickr30k.json")
    held = read_json(path, dict, 'an object with "images"')
    with reading(path):
        for image in held["images"]:
            if image["split"] == split:
                name = file_name(image["filename"])
                yield Entry(name, CAPTION, text_of(image["sentences"][0], "raw"), f"flickr30k-images/{name}")


def vision_flan(source: Path, split: str) -> Iterator[Entry]:
    """Yield Vision-Flan's samples; `task_name` is the task."""
    path = official(source, "annotation_191-task_1k.json")
    folder = official(source, *VISION_FLAN_IMAGES).name
    samples = read_json(path, list, "a list of samples")
    with reading(path):
        for sample in samples:
            human, answering = sample["conversations"][:2]
            question = asked(text_of(human, "value").replace(IMAGE, ""))
            image = f"{folder}/{file_name(sample['image'])}"
            yield Entry(sample["id"], question, text_of(answering, "value"), image, task=text_of(sample, "task_name"))
