"""Whole benchmarks in their official folders, with pictures: what `llava-steering prepare` reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def write(path: Path, value: Any) -> None:
    """Write JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, values: Sequence[Any]) -> None:
    """Write JSON, one value a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def picture(path: Path) -> None:
    """Write a small picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)


def _humans(*answers: str) -> list[dict[str, Any]]:
    return [{"answer": answers[n % len(answers)], "answer_confidence": "yes", "answer_id": n} for n in range(10)]


def _coco(folder: Path, prefix: str, parts: Sequence[str]) -> None:
    for part in parts:
        numbers = (1, 2, 3)
        questions = [{"question_id": n, "image_id": 10 + n, "question": f"What is {n}?"} for n in numbers]
        write(folder / f"{prefix}OpenEnded_mscoco_{part}_questions.json", {"questions": questions, "info": {}})
        for n in numbers:
            picture(folder / part / f"COCO_{part}_{10 + n:012d}.jpg")
        if part != "test2015":
            found = [
                {"question_id": n, "image_id": 10 + n, "answer_type": "other", "answers": _humans("red", "blue", "red")}
                for n in numbers
            ]
            write(folder / f"{prefix}mscoco_{part}_annotations.json", {"annotations": found})


def _textvqa(folder: Path) -> None:
    for split in ("train", "val", "test"):
        data = [{"question_id": n, "image_id": f"im{n}", "question": f"What word is {n}?"} for n in range(3)]
        for entry in data:
            picture(folder / f"{'test' if split == 'test' else 'train'}_images" / f"{entry['image_id']}.jpg")
            if split != "test":
                entry["answers"] = ["stop"] * 6 + ["go"] * 4
        write(folder / f"TextVQA_0.5.1_{split}.json", {"data": data})


def _vizwiz(folder: Path) -> None:
    for split in ("train", "val", "test"):
        entries: list[dict[str, Any]] = [
            {"image": f"VizWiz_{split}_{n}.jpg", "question": "What is this?"} for n in range(3)
        ]
        for entry in entries:
            picture(folder / split / entry["image"])
            if split != "test":
                entry |= {"answers": _humans("grey", "grey", "unanswerable"), "answer_type": "other", "answerable": 1}
        write(folder / f"{split}.json", entries)


def _gqa(folder: Path) -> None:
    for split in ("train", "val", "testdev"):
        questions = {
            f"0{n}": {"question": "Is it red?", "answer": "yes", "imageId": f"n{n}", "types": {"structural": "verify"}}
            for n in range(3)
        }
        write(folder / f"{split}_balanced_questions.json", questions)
    for n in range(3):
        picture(folder / "images" / f"n{n}.jpg")


def _scienceqa(folder: Path) -> None:
    problems = {
        str(n): {
            "question": "Which is a dog?",
            "choices": ["a cat", "a dog"],
            "answer": n % 2,
            "hint": "Look." * (n % 2),
        }
        | {"image": "image.png" if n < 4 else None}
        for n in range(6)
    }
    for n in range(4):
        picture(folder / "images" / ("train" if n < 2 else "test") / str(n) / "image.png")
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"train": ["0", "1", "4"], "val": [], "test": ["2", "3", "5"]})


def _iconqa(folder: Path) -> None:
    kinds = {"choose_txt": {"choices": ["four", "five"], "answer": 1}, "fill_in_blank": {"answer": "4"}}
    problems, splits = {}, {}
    for place, (kind, rest) in enumerate(kinds.items()):
        for split in ("train", "test"):
            numbers = [str(100 * place + n + (50 if split == "test" else 0)) for n in range(2)]
            splits[f"{kind}_{split}"] = numbers
            for number in numbers:
                problems[number] = {"question": "How many?", "ques_type": kind, **rest}
                picture(folder / "iconqa" / split / kind / number / "image.png")
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", splits)


def _flickr30k(folder: Path) -> None:
    images = [
        {"filename": f"{n}.jpg", "split": "train", "sentences": [{"raw": "A dog ."}, {"raw": "x"}]} for n in (1, 2)
    ]
    write(folder / "dataset_flickr30k.json", {"images": images})
    for image in images:
        picture(folder / "flickr30k-images" / str(image["filename"]))


def _vision_flan(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red"}]
    samples = [{"id": f"s{n}", "image": f"s{n}.jpg", "task_name": f"task{n}", "conversations": turns} for n in (1, 2)]
    write(folder / "annotation_191-task_1k.json", samples)
    for sample in samples:
        picture(folder / "images_191task_1k" / str(sample["image"]))


def _pope(folder: Path) -> None:
    picture(folder / "val2014" / "COCO_val2014_000000000001.jpg")
    for split in ("random", "popular", "adversarial"):
        lines = [
            {"question_id": n, "image": "COCO_val2014_000000000001.jpg", "text": "Is there a dog?", "label": label}
            for n, label in ((1, "yes"), (2, "no"))
        ]
        write_lines(folder / f"coco_pope_{split}.json", lines)


def _mme(folder: Path) -> None:
    text = "Is there a dog? Please answer yes or no.\tYes\nIs there a cat? Please answer yes or no.\tNo\n"
    for subtask, texts, images in (("existence", "", ""), ("OCR", "questions_answers_YN", "images")):
        picture(folder / subtask / images / "1.png")
        (folder / subtask / texts).mkdir(exist_ok=True)
        (folder / subtask / texts / "1.txt").write_text(text)


def _mmvet(folder: Path) -> None:
    write(folder / "mm-vet.json", {"v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "1"}})
    picture(folder / "images" / "v1_0.png")


def _hallusionbench(folder: Path) -> None:
    entry = {"category": "VS", "subcategory": "map", "set_id": "0", "question_id": "0", "question": "Is it larger?"}
    entries = [{**entry, "visual_input": str(n), "figure_id": str(n)} for n in (0, 1)]
    write(folder / "HallusionBench.json", entries)
    picture(folder / "hallusion_bench" / "VS" / "map" / "0_1.png")


def _vsr(folder: Path) -> None:
    line = {"image": "1.jpg", "caption": "It is on it."}
    for kind in ("random", "zeroshot"):
        for split in ("train", "dev", "test"):
            write_lines(folder / "splits" / kind / f"{split}.jsonl", [{**line, "label": label} for label in (0, 1)])
    picture(folder / "images" / "1.jpg")


def _snli_ve(folder: Path) -> None:
    for split in ("train", "dev", "test"):
        key = "Flikr30kID" if split == "dev" else "Flickr30K_ID"  # both have been released
        line = {"pairID": "1.jpg#0", "gold_label": "neutral", "sentence2": "It rains.", key: "1"}
        write_lines(folder / f"snli_ve_{split}.jsonl", [line])
    picture(folder / "flickr30k-images" / "1.jpg")


def _cifar10(folder: Path) -> None:
    (folder / "batches.meta.txt").write_text("airplane\nbird\n\n")
    for name in ("test_batch", *(f"data_batch_{n}" for n in range(1, 6))):
        records = [bytes((label,)) + bytes((200,)) * 1024 + bytes(2048) for label in (1, 0)]
        (folder / f"{name}.bin").write_bytes(b"".join(records))


def _cifar100(folder: Path) -> None:
    (folder / "fine_label_names.txt").write_text("apple\naquarium_fish\n")
    for name in ("train", "test"):
        (folder / f"{name}.bin").write_bytes(b"".join(bytes((0, label)) + bytes(3072) for label in (1, 0)))


def _mnist(folder: Path) -> None:
    for name in ("train", "t10k"):
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(bytes((0, 0, 8, 1, 0, 0, 0, 2, 7, 1)))
        head = bytes((0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28))
        (folder / f"{name}-images-idx3-ubyte").write_bytes(head + bytes(784) + bytes((255,)) * 784)


def _hellaswag(folder: Path) -> None:
    for split in ("train", "val"):
        lines = [{"ind": n, "ctx": "He <image> runs", "endings": list("wxyz"), "label": "2"} for n in (4, 7)]
        write_lines(folder / f"hellaswag_{split}.jsonl", lines)


def _mmlu(folder: Path) -> None:
    for split in ("dev", "val", "test"):
        (folder / split).mkdir(parents=True)
        (folder / split / f"anatomy_{split}.csv").write_text('"Which, then?",1,2,3,4,B\nWhy?,1,2,3,4,D\n')


MAKERS: dict[str, Callable[[Path], None]] = {
    "vqav2": lambda to: _coco(to, "v2_", ("train2014", "val2014", "test2015")),
    "okvqa": lambda to: _coco(to, "", ("train2014", "val2014")),
    **{"textvqa": _textvqa, "vizwiz": _vizwiz, "gqa": _gqa, "scienceqa": _scienceqa, "scienceqa_img": _scienceqa},
    **{"iconqa_text": _iconqa, "iconqa_blank": _iconqa, "flickr30k": _flickr30k, "vision_flan": _vision_flan},
    **{"pope": _pope, "mme": _mme, "mmvet": _mmvet, "hallusionbench": _hallusionbench, "vsr": _vsr},
    **{
        "snli_ve": _snli_ve,
        "hellaswag": _hellaswag,
        "mmlu": _mmlu,
        "cifar10": _cifar10,
        "cifar100": _cifar100,
        "mnist": _mnist,
    },
}


def make_source(task: str, folder: Path) -> Path:
    """Write a benchmark in its official layout."""
    folder.mkdir(parents=True, exist_ok=True)
    MAKERS[task](folder)
    return folder
