"""Choices by letter: ScienceQA, HellaSwag and MMLU.

Sources: ScienceQA (arXiv 2209.09513) by the rule of LLaVA's `llava/eval/eval_science_qa.py`; HellaSwag (arXiv
1905.07830, its `hellaswag_val.jsonl`); MMLU (arXiv 2009.03300, github.com/hendrycks/test: the mean over all questions,
and over each subject). The official code of the last two compares likelihoods of choices; here the model says a letter,
which is read as ScienceQA's is.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.evaluation.benchmark import Metrics, Pair, Points, References, Wanted, accuracies
from llava_steering_plugin.evaluation.official_files import keyed, official, read_json, read_lines, reading

LETTERS = "ABCDE"
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def letter_of(text: str) -> str | None:
    """Return the letter of an answer: alone, before ". ", or once in "The answer is X."; None: none of these."""
    if text in tuple(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else None


def letter_points(pairs: Sequence[Pair]) -> Points:
    """Tell which answers are the letter of the right choice."""
    return {pair.key: float(_is_right(pair.text, pair.reference)) for pair in pairs}


def letter_metrics(pairs: Sequence[Pair]) -> Metrics:
    """Return the accuracy of all questions, and of each group that references name."""
    points = letter_points(pairs)
    return accuracies(points, {pair.key: pair.reference["group"] for pair in pairs if pair.reference["group"]})


def _is_right(text: str, reference: Mapping[str, Any]) -> bool:
    letter = letter_of(text)
    return (
        letter is not None and letter in LETTERS[: reference["choices"]] and LETTERS.index(letter) == reference["right"]
    )


def read_scienceqa(source: Path, wanted: Wanted) -> References:
    """Read ScienceQA's problems of a split (default: test), those with an image as a group.

    Raises:
        DataError: the files are missing, damaged, or of another layout.
    """
    return _read_scienceqa(source, wanted.split or "test", only_images=False)


def read_scienceqa_img(source: Path, wanted: Wanted) -> References:
    """Read ScienceQA's problems with an image.

    Raises:
        DataError: the files are missing, damaged, or of another layout.
    """
    return _read_scienceqa(source, wanted.split or "test", only_images=True)


def _read_scienceqa(source: Path, split: str, *, only_images: bool) -> References:
    path = official(source, "problems.json", "data/scienceqa/problems.json")
    problems = read_json(path, dict, "an object of problems by number")
    splits = read_json(path.with_name("pid_splits.json"), dict, "an object of splits")
    with reading(path.with_name("pid_splits.json")):
        numbers = splits[split]
    with reading(path):
        chosen = [(number, problems[str(number)]) for number in numbers]
        return References(
            keyed(path, ((number, _problem(each)) for number, each in chosen if each.get("image") or not only_images))
        )


def _problem(problem: Mapping[str, Any]) -> dict[str, Any]:
    group = "with an image" if problem.get("image") else "text alone"
    return _reference(problem["answer"], len(problem["choices"]), group)


def _reference(right: Any, choices: int, group: str | None = None) -> dict[str, Any]:
    if not isinstance(right, int) or not 0 <= right < choices:
        raise ValueError(f"its answer {right!r} is none of its {choices} choices")
    return {"right": right, "choices": choices, "group": group}


def read_hellaswag(source: Path, wanted: Wanted) -> References:
    """Read HellaSwag's questions; `ind` is the id.

    Raises:
        DataError: the file is missing, damaged, or of another layout.
    """
    path = official(source, "hellaswag_val.jsonl")
    lines = read_lines(path)
    with reading(path):
        return References(
            keyed(path, ((line["ind"], _reference(int(line["label"]), len(line["endings"]))) for line in lines))
        )


def read_mmlu(source: Path, wanted: Wanted) -> References:
    """Read MMLU's questions: SUBJECT_test.csv in `test`, without a heading. SUBJECT/ROW is the id, rows from 0.

    Raises:
        DataError: the folder or its files are missing, damaged, or of another layout.
    """
    split = wanted.split or "test"
    folder = source / split if (source / split).is_dir() else source
    files = sorted(folder.glob(f"*_{split}.csv"))
    if not files:
        raise DataError(f"{folder} holds no files SUBJECT_{split}.csv. Is it MMLU's data folder?")
    pairs = []
    for file in files:
        subject = file.stem.removesuffix(f"_{split}")
        with reading(file), file.open(newline="", encoding="utf-8") as lines:
            for number, row in enumerate(csv.reader(lines)):
                *_, right = row
                if len(row) != 6 or right not in tuple("ABCD"):
                    raise ValueError(f"row {number} is no question, four choices and a letter")
                pairs.append((f"{subject}/{number}", _reference(LETTERS.index(right), 4, subject)))
    return References(keyed(folder, pairs))
