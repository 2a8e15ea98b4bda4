"""ScienceQA, IconQA, HellaSwag and MMLU: questions with choices, and IconQA's blanks."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.evaluation.layouts.entry import LETTER, LETTERS, SHORT, Entry, asked, file_name, options
from llava_steering_plugin.evaluation.official_files import official, read_json, read_lines, reading, text_of


def scienceqa(source: Path, split: str) -> Iterator[Entry]:
    """Yield ScienceQA's problems; images are in images/SPLIT/NUMBER."""
    for number, problem, path in _problems(source, split, split):
        with reading(path):
            right, choices = int(problem["answer"]), problem["choices"]
            hint = f"Context: {problem['hint'].strip()}" if problem.get("hint", "").strip() else None
            lines = [line for line in (hint, options(choices), LETTER) if line]
            image = f"images/{split}/{number}/{file_name(problem['image'])}" if problem.get("image") else None
            yield Entry(number, asked(text_of(problem, "question"), *lines), LETTERS[: len(choices)][right], image)


def scienceqa_img(source: Path, split: str) -> Iterator[Entry]:
    """Yield ScienceQA's problems that have an image."""
    return (entry for entry in scienceqa(source, split) if entry.image is not None)


def iconqa_text(source: Path, split: str) -> Iterator[Entry]:
    """Yield IconQA's problems with a choice of texts; the answer is the text."""
    for number, problem, path in _problems(source, f"choose_txt_{split}", split):
        with reading(path):
            choices = [str(choice) for choice in problem["choices"]]
            question = asked(text_of(problem, "question"), f"Choices: {', '.join(choices)}", SHORT)
            image = f"iconqa/{split}/choose_txt/{number}/image.png"
            yield Entry(number, question, choices[int(problem["answer"])], image)


def iconqa_blank(source: Path, split: str) -> Iterator[Entry]:
    """Yield IconQA's problems with a blank to fill."""
    for number, problem, path in _problems(source, f"fill_in_blank_{split}", split):
        with reading(path):
            image = f"iconqa/{split}/fill_in_blank/{number}/image.png"
            yield Entry(number, asked(text_of(problem, "question"), SHORT), str(problem["answer"]), image)


def _problems(source: Path, part: str, split: str) -> Iterator[tuple[str, Mapping[str, Any], Path]]:
    path = official(source, "problems.json")
    problems = read_json(path, dict, "an object of problems by number")
    splits_path = path.with_name("pid_splits.json")
    splits = read_json(splits_path, dict, "an object of splits")
    with reading(splits_path):
        numbers = [file_name(number) for number in splits[part]]
    with reading(path):
        chosen = [(number, problems[number], path) for number in numbers]
    yield from chosen


def hellaswag(source: Path, split: str) -> Iterator[Entry]:
    """Yield HellaSwag's questions: which ending is the right one?"""
    path = official(source, f"hellaswag_{split}.jsonl")
    lines = read_lines(path)
    with reading(path):
        for line in lines:
            endings = line["endings"]
            said = None if split == "test" else LETTERS[: len(endings)][int(line["label"])]
            question = asked(text_of(line, "ctx"), "Which ending fits?", options(endings), LETTER)
            yield Entry(line["ind"], question, said, None)


def mmlu(source: Path, split: str) -> Iterator[Entry]:
    """Yield MMLU's questions, whose subjects are the tasks of a training."""
    files = sorted((source / split).glob(f"*_{split}.csv"))
    if not files:
        raise DataError(f"{source / split} holds no files SUBJECT_{split}.csv. Is {source} MMLU's data folder?")
    for file in files:
        subject = file.stem.removesuffix(f"_{split}")
        with reading(file), file.open(newline="", encoding="utf-8") as rows:
            for number, row in enumerate(csv.reader(rows)):
                if len(row) != 6 or row[5] not in tuple("ABCD"):
                    raise ValueError(f"row {number} is no question, four choices and a letter")
                question = asked(row[0], options(row[1:5]), LETTER)
                yield Entry(f"{subject}/{number}", question, row[5], None, task=f"mmlu/{subject}")
