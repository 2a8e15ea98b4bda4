"""MMMU: multiple choice and open questions, by the parsing rules of its own evaluation.

Source: MMMU (arXiv 2311.16502, github.com/MMMU-Benchmark/MMMU, `mmmu/utils/eval_utils.py`; both of its programs,
`main_parse_and_eval.py` and `main_eval_only.py`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.evaluation.benchmark import ALL, Metrics, Pair, Points, References, Wanted, percent
from llava_steering_plugin.evaluation.official_files import keyed, read_json, reading, text_of

# In the order of the official code: what it draws at random for unreadable answers follows this order.
SUBJECTS = """
    Accounting Agriculture Architecture_and_Engineering Art Art_Theory Basic_Medical_Science Biology Chemistry
    Clinical_Medicine Computer_Science Design Diagnostics_and_Laboratory_Medicine Economics Electronics Energy_and_Power
    Finance Geography History Literature Manage Marketing Materials Math Mechanical_Engineering Music Pharmacy Physics
    Psychology Public_Health Sociology
""".split()
DISCIPLINES = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
CHOICE = "multiple-choice"
SEED = 42  # of the official code's draws
LONG = 5  # words: only longer answers are searched for the text of a choice

_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = {":", ",", ".", "!", "?", ";", "'"}
_SENTENCES = re.compile(r"\.\s(?=[A-Z])|\n")
_NUMBERS = tuple(
    re.compile(pattern)
    for pattern in (
        r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,234
        r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.2e-3
        r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
    )
)


def choice_of(text: str, choices: Mapping[str, str], draw: Callable[[Sequence[str]], str]) -> str:
    """Return the letter that an answer chooses.

    Letters in brackets count first, then letters between spaces, then the text of a choice in an answer of more than
    five words. Of several, the one that stands last counts. Without any, one is drawn.

    Args:
        choices: the text of each choice by its letter.
        draw: draws one of the letters.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    places = {letter: text.rfind(f"({letter})") for letter in choices}
    if max(places.values()) < 0:
        places = {letter: text.rfind(f" {letter} ") for letter in choices}
    if max(places.values()) < 0 and len(text.split()) > LONG:
        places = {letter: text.lower().rfind(choice.lower()) for letter, choice in choices.items()}
    if max(places.values()) < 0:
        return draw(list(choices))
    return max(places, key=lambda letter: places[letter])


def open_answers(text: str) -> set[str | float]:
    """Return all that an open answer may be taken to say: the ends of its telling sentences, and their numbers."""
    found: set[str | float] = set()
    tails = _tails(text.strip().strip(".").lower())
    for tail in tails:
        found.update(_normal(tail))
        for pattern in _NUMBERS:
            for number in pattern.findall(tail):
                found.update(_normal(number))
    return found


def _tails(text: str) -> list[str]:
    """Return, of each sentence with a key word, the shortest text behind one; the whole text if there is none."""
    sentences = _SENTENCES.split(text)
    tails = []
    for number, sentence in enumerate(sentences):
        keys = (*_KEYS, "=") if number == len(sentences) - 1 else _KEYS
        shortest = ""
        for key in keys:
            if key in sentence:
                tail = sentence.split(key)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in _TRIVIAL:
            tails.append(shortest)
    return tails or [text]


def _normal(text: str) -> list[str | float]:
    """Return a number rounded to two decimals, or the text in lower case; one character is no match inside a word."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def is_right(text: str, right: str | Sequence[str]) -> bool:
    """Tell whether an open answer says one of the right texts, or is one of the right numbers."""
    expected = [value for each in ([right] if isinstance(right, str) else right) for value in _normal(each)]
    texts = [value for value in expected if isinstance(value, str)]
    return any(
        any(value in said for value in texts) if isinstance(said, str) else said in expected
        for said in open_answers(text)
    )


def read_mmmu(source: Path, wanted: Wanted) -> References:
    """Read MMMU's questions in one of the layouts of its evaluation.

    A folder of SUBJECT/output.json has the choices, and answers are parsed. answer_dict_val.json has none, so a choice
    must be a letter.

    Raises:
        DataError: the files are missing, damaged, or of another layout.
    """
    if source.is_dir():
        files = [file for subject in SUBJECTS if (file := source / subject / "output.json").is_file()]
        if not files:
            raise DataError(f"{source} holds no SUBJECT/output.json. Give answer_dict_val.json, or such a folder.")
        pairs = []
        for file in files:
            entries = read_json(file, list, "a list of questions")
            with reading(file):
                pairs += [(entry["id"], _reference(entry, file.parent.name, entry["answer"])) for entry in entries]
        return References(keyed(source, pairs))
    entries = read_json(source, dict, "an object of questions by id")
    with reading(source):
        pairs = [(key, _reference(entry, _subject(key), entry["ground_truth"])) for key, entry in entries.items()]
        order = {subject: place for place, subject in enumerate(SUBJECTS)}
        unknown = sorted({each["subject"] for _, each in pairs} - order.keys())
        if unknown:
            raise ValueError(f"subject {unknown[0]!r} is unknown")
        return References(keyed(source, sorted(pairs, key=lambda each: order[each[1]["subject"]])))


def _subject(key: str) -> str:
    return "_".join(key.split("_")[1:-1])


def _reference(entry: Mapping[str, Any], subject: str, right: Any) -> dict[str, Any]:
    if not all(isinstance(each, str) for each in (right if isinstance(right, list) else [right])):
        raise TypeError(f"its answer {right!r} is no text")
    choices = entry.get("index2ans") if entry["question_type"] == CHOICE else None
    if choices is not None and not (choices and all(isinstance(text, str) for text in choices.values())):
        raise TypeError(f"its choices {choices!r} are no texts by letter")
    return {"kind": text_of(entry, "question_type"), "choices": choices, "right": right, "subject": subject}


def mmmu_points(pairs: Sequence[Pair]) -> Points:
    """Tell which questions are answered right; for unreadable choices this depends on the draws before them."""
    draw = random.Random(SEED).choice
    return {pair.key: float(_point(pair, draw)) for pair in pairs}


def mmmu_metrics(pairs: Sequence[Pair]) -> Metrics:
    """Return the accuracy of all questions, of each discipline and of each subject."""
    of_question = mmmu_points(pairs)
    points: dict[str, list[float]] = {}
    for pair in pairs:
        points.setdefault(pair.reference["subject"], []).append(of_question[pair.key])
    metrics: Metrics = {ALL: _row([point for each in points.values() for point in each])}
    for discipline, names in DISCIPLINES.items():
        subjects = [subject for subject in names.split() if subject in points]
        if subjects:
            metrics[discipline] = _row([point for subject in subjects for point in points[subject]])
            metrics |= {subject: _row(points[subject]) for subject in subjects}
    return metrics


def _row(points: Sequence[float]) -> dict[str, float | int | None]:
    return {"accuracy": percent(points), "questions": len(points)}


def _point(pair: Pair, draw: Callable[[Sequence[str]], str]) -> bool:
    reference = pair.reference
    if reference["kind"] != CHOICE:
        return is_right(pair.text, reference["right"])
    said = pair.text if reference["choices"] is None else choice_of(pair.text, reference["choices"], draw)
    return said in reference["right"] if isinstance(reference["right"], list) else said == reference["right"]
