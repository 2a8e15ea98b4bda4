"""VQA accuracy over ten annotators: VQAv2, OK-VQA, TextVQA and VizWiz.

An answer is right by min(1, n / 3), n of the other nine annotators giving it, averaged over which one is left out.
Sources: VQA (arXiv 1505.00468, github.com/GT-Vision-Lab/VQA); OK-VQA uses the same code; TextVQA (arXiv 1904.08920;
LLaVA's `llava/eval/eval_textvqa.py`); VizWiz (arXiv 1802.08218, the evaluation code on vizwiz.org).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llava_steering_plugin.evaluation.benchmark import (
    GivenAnswer,
    Metrics,
    Pair,
    Points,
    References,
    Wanted,
    accuracies,
)
from llava_steering_plugin.evaluation.official_files import (
    keyed,
    official,
    read_json,
    reading,
    text_of,
    text_or_none,
)
from llava_steering_plugin.evaluation.scores.vqa_text import one_line, textvqa_answer, vqa_answer

ENOUGH = 3  # annotators that make an answer wholly right


def leave_one_out(answer: str, humans: Sequence[str]) -> float:
    """Return the accuracy of an answer, between 0 and 1.

    Args:
        humans: the annotators' answers, normalised like `answer`.
    """
    same = sum(human == answer for human in humans)
    without_a_match, without_another = min(1.0, max(0, same - 1) / ENOUGH), min(1.0, same / ENOUGH)
    return (same * without_a_match + (len(humans) - same) * without_another) / len(humans)


def vqa_point(text: str, humans: Sequence[str]) -> float:
    """Score an answer by VQA's rule. It is normalised first as LLaVA does for the test server.

    Where all annotators agree, the official code compares texts as they are; elsewhere it normalises both sides.
    """
    answer, said = one_line(textvqa_answer(text)), [one_line(human) for human in humans]
    if len(set(said)) > 1:
        answer, said = vqa_answer(answer), [vqa_answer(human) for human in said]
    return leave_one_out(answer, said)


def vizwiz_point(text: str, humans: Sequence[str]) -> float:
    """Score an answer by VizWiz's rule: it is normalised, and the annotators' answers are taken as they are."""
    return leave_one_out(vqa_answer(textvqa_answer(text)), humans)


def textvqa_point(text: str, humans: Sequence[str]) -> float:
    """Score an answer by TextVQA's rule: both sides are normalised."""
    return leave_one_out(textvqa_answer(text), [textvqa_answer(human) for human in humans])


def vqa_points(pairs: Sequence[Pair]) -> Points:
    """Return the accuracy of each question by VQA's rule."""
    return {pair.key: vqa_point(pair.text, pair.reference["answers"]) for pair in pairs}


def vqa_metrics(pairs: Sequence[Pair]) -> Metrics:
    """Return the accuracy of all questions and of each type of answer."""
    return _by_type(vqa_points(pairs), pairs)


def vizwiz_points(pairs: Sequence[Pair]) -> Points:
    """Return the accuracy of each question by VizWiz's rule."""
    return {pair.key: vizwiz_point(pair.text, pair.reference["answers"]) for pair in pairs}


def vizwiz_metrics(pairs: Sequence[Pair]) -> Metrics:
    """Return the accuracy of all questions and of each type of answer."""
    return _by_type(vizwiz_points(pairs), pairs)


def textvqa_points(pairs: Sequence[Pair]) -> Points:
    """Return the accuracy of each question by TextVQA's rule."""
    return {pair.key: textvqa_point(pair.text, pair.reference["answers"]) for pair in pairs}


def textvqa_metrics(pairs: Sequence[Pair]) -> Metrics:
    """Return the accuracy of all questions."""
    return _by_type(textvqa_points(pairs), pairs)


def _by_type(points: Points, pairs: Sequence[Pair]) -> Metrics:
    return accuracies(points, {pair.key: pair.reference["type"] for pair in pairs if pair.reference["type"]})


def read_vqa(source: Path, wanted: Wanted) -> References:
    """Read VQA's annotations, or its questions, which are all that there is of a test split.

    Raises:
        DataError: the file is missing, damaged, or of another layout.
    """
    path = official(source, "v2_mscoco_val2014_annotations.json", "mscoco_val2014_annotations.json")
    held = read_json(path, dict, 'an object with "annotations" (or, of a test split, "questions")')
    with reading(path):
        secret = "annotations" not in held
        entries = held["questions" if secret else "annotations"]
        items = keyed(path, ((entry["question_id"], _vqa_reference(entry, secret)) for entry in entries))
    return References(items, secret=secret)


def _vqa_reference(entry: Any, secret: bool) -> dict[str, Any]:
    humans = [] if secret else [text_of(each, "answer") for each in entry["answers"]]
    return {"id": entry["question_id"], "answers": _some(humans, secret), "type": text_or_none(entry, "answer_type")}


def _some(humans: list[str], secret: bool = False) -> list[str]:
    if not humans and not secret:
        raise ValueError("a question has no answers")
    return humans


def read_vizwiz(source: Path, wanted: Wanted) -> References:
    """Read VizWiz' annotations: a list of questions, each about an image of its own, whose name is the question's id.

    Raises:
        DataError: the file is missing, damaged, or of another layout.
    """
    path = official(source, "val.json", "annotations/val.json", "Annotations/val.json")
    entries = read_json(path, list, "a list of questions")
    with reading(path):
        secret = not any("answers" in entry for entry in entries)
        humans = ([] if secret else [text_of(each, "answer") for each in entry["answers"]] for entry in entries)
        references = [
            (entry["image"], {"answers": _some(said, secret), "type": text_or_none(entry, "answer_type")})
            for entry, said in zip(entries, humans, strict=True)
        ]
    return References(keyed(path, references), secret=secret)


def read_textvqa(source: Path, wanted: Wanted) -> References:
    """Read TextVQA's annotations.

    LLaVA's question file gives the id of the image, which several questions share, so its answers are told apart by
    their prompt. Answers with the official question_id need none.

    Raises:
        DataError: the file is missing, damaged, or of another layout.
    """
    path = official(source, "TextVQA_0.5.1_val.json")
    held = read_json(path, dict, 'an object with "data"')
    of_image: dict[str, dict[str, str]] = {}
    with reading(path):
        secret = not any("answers" in entry for entry in held["data"])
        items = keyed(path, ((each["question_id"], _textvqa_reference(each, secret)) for each in held["data"]))
        for entry in held["data"]:
            of_image.setdefault(str(entry["image_id"]), {})[entry["question"].lower()] = str(entry["question_id"])

    def find(answer: GivenAnswer) -> str | None:
        if answer.id in items:
            return answer.id
        asked = of_image.get(answer.id, {})
        return next((asked[text] for text in _questions_in(answer.prompt) if text in asked), None)

    return References(items, secret=secret, find=find)


def _textvqa_reference(entry: Any, secret: bool) -> dict[str, Any]:
    if secret:
        return {"id": entry["question_id"]}
    if not all(isinstance(answer, str) for answer in entry["answers"]):
        raise TypeError("an answer is no text")
    return {"id": entry["question_id"], "answers": _some(list(entry["answers"])), "type": None}


def _questions_in(prompt: str) -> Iterable[str]:
    """Yield what may be the question of a prompt, in lower case: its lines, and what LLaVA's older prompts name so."""
    yield from prompt.lower().split("\n")
    yield from re.findall(r"question: (.*?) short answer:", prompt.lower(), re.DOTALL)


def vqa_submission(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Return what the test servers of VQAv2 and TextVQA take: every question of the split, normalised as LLaVA does."""
    return [{"question_id": pair.reference["id"], "answer": textvqa_answer(pair.text)} for pair in pairs]


def vizwiz_submission(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Return what VizWiz' test server takes."""
    return [{"image": pair.key, "answer": textvqa_answer(pair.text)} for pair in pairs]
