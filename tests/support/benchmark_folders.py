"""Tiny benchmarks in their official layouts, with answers to them and the numbers that the official rules give.

Every case is worked out by hand from the rule, none by the code that it tests.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HALF, THIRD = 50.0, 100 / 3


@dataclass(frozen=True)
class Case:
    """A benchmark on disk.

    Attributes:
        answers: (question_id, text, prompt) of each answer.
        expected: metrics that must be among those computed.
        options: further words for `llava-steering score`.
    """

    annotations: Path
    answers: Sequence[tuple[Any, str, str]]
    expected: dict[str, dict[str, float]]
    options: tuple[str, ...] = ()

    def write_answers(self, file: Path) -> Path:
        """Write the answers as `llava-steering eval` does."""
        return write_answers(file, self.answers)


def write_answers(file: Path, answers: Sequence[tuple[Any, str, str]]) -> Path:
    """Write LLaVA's answer.jsonl."""
    lines = [
        {"question_id": key, "prompt": prompt, "text": text, "answer_id": "a", "model_id": "m", "metadata": {}}
        for key, text, prompt in answers
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def _write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def _write_lines(path: Path, values: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def _answers(*texts: str) -> list[tuple[int, str, str]]:
    return [(number, text, "") for number, text in enumerate(texts)]


def _humans(**votes: int) -> list[dict[str, Any]]:
    texts = [text.replace("_", " ") for text, count in votes.items() for _ in range(count)]
    assert len(texts) == 10
    return [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(texts, 1)]


def _vqa(folder: Path, name: str) -> Case:
    questions = [
        {"question_id": 1, "image_id": 7, "answer_type": "other", "answers": _humans(the_red=3, blue=7)},
        {"question_id": 2, "image_id": 7, "answer_type": "yes/no", "answers": _humans(yes=10)},
        {"question_id": 3, "image_id": 8, "answer_type": "number", "answers": _humans(two=2, three=8)},
    ]
    path = _write(folder / name, {"annotations": questions, "info": {}})
    # 3 of 10: one left out of the three leaves 2 / 3, of the seven 1. 2 of 10: 1 / 3 and 2 / 3.
    red, two = (3 * 2 / 3 + 7) / 10, (2 / 3 + 8 * 2 / 3) / 10
    return Case(
        path,
        [(1, "Red.", ""), (2, "Yes", ""), (3, "2", "")],
        {
            "all": {"accuracy": 100 * (red + 1 + two) / 3, "questions": 3},
            "other": {"accuracy": 100 * red},
            "number": {"accuracy": 100 * two},
        },
    )


def _textvqa(folder: Path) -> Case:
    data = [
        {"question_id": 5, "image_id": "aa", "question": "What brand?", "answers": ["nokia"] * 10},
        {"question_id": 6, "image_id": "aa", "question": "What time is it?", "answers": ["10:10"] * 4 + ["ten"] * 6},
        {"question_id": 7, "image_id": "bb", "question": "What Word?", "answers": ["stop"] * 10},
    ]
    path = _write(folder / "TextVQA_0.5.1_val.json", {"data": data, "dataset_type": "val"})
    call = "\nReference OCR token: NOKIA\nAnswer the question using a single word or phrase."
    return Case(
        path,
        [("aa", "Nokia", "What brand?" + call), ("aa", "ten", "What time is it?" + call), ("bb", "go", "What Word?")],
        {"all": {"accuracy": 200 / 3, "questions": 3}},
    )


def _vizwiz(folder: Path) -> Case:
    answers = _humans(Unsuitable=4, grey=6)
    questions = [
        {"image": "VizWiz_val_0.jpg", "question": "What?", "answers": answers, "answer_type": "other", "answerable": 1},
        {"image": "VizWiz_val_1.jpg", "question": "Who?", "answers": _humans(grey=10), "answer_type": "other"},
    ]
    # The annotators' answers are not normalised: nothing is equal to "Unsuitable".
    return Case(
        _write(folder / "val.json", questions),
        [("VizWiz_val_0.jpg", "Unsuitable", ""), ("VizWiz_val_1.jpg", "Grey", "")],
        {"all": {"accuracy": HALF, "questions": 2}, "other": {"accuracy": HALF}},
    )


def _gqa(folder: Path) -> Case:
    kinds = {"semantic": "attr", "detailed": "x"}
    questions = {
        "02": {"question": "Which?", "answer": "red", "isBalanced": True, "types": {"structural": "query", **kinds}},
        "03": {"question": "Is it?", "answer": "yes", "isBalanced": True, "types": {"structural": "verify", **kinds}},
        "04": {"question": "Is he?", "answer": "no", "isBalanced": False, "types": {"structural": "verify", **kinds}},
    }
    return Case(
        _write(folder / "testdev_balanced_questions.json", questions),
        [("02", "Red.", ""), ("03", "no", ""), ("04", "no", "")],
        {"all": {"accuracy": HALF, "questions": 2}, "open": {"accuracy": 100.0}, "binary": {"accuracy": 0.0}},
    )


def scienceqa(folder: Path) -> Path:
    """Write ScienceQA's two files: five problems, of which number 5 is of another split."""
    problem = {"question": "Which?", "choices": ["x", "y"], "hint": "", "split": "test", "lecture": "", "solution": ""}
    problems = {
        str(number): {**problem, "answer": number % 2, "image": "image.png" if number < 3 else None}
        for number in range(1, 6)
    }
    _write(folder / "problems.json", problems)
    _write(folder / "pid_splits.json", {"test": ["1", "2", "3", "4"], "train": ["5"]})
    return folder


def _scienceqa(folder: Path) -> Case:
    answers = [("1", "B", ""), ("2", "B. y", ""), ("3", "The answer is B.", ""), ("4", "a", "")]
    expected = {"all": {"accuracy": HALF, "questions": 4}, "with an image": {"accuracy": HALF, "questions": 2}}
    return Case(scienceqa(folder), answers, expected)


def _scienceqa_img(folder: Path) -> Case:
    return Case(scienceqa(folder), [("1", "B", ""), ("2", "A. x", "")], {"all": {"accuracy": 100.0, "questions": 2}})


def _iconqa(folder: Path, kind: str) -> Case:
    problems = {
        "11": {"question": "What?", "choices": ["cube", "sphere"], "answer": 1, "ques_type": "choose_txt"},
        "12": {"question": "What?", "choices": ["five", "six"], "answer": 0, "ques_type": "choose_txt"},
        "21": {"question": "How many?", "answer": "four", "ques_type": "fill_in_blank"},
        "22": {"question": "How many?", "answer": "12", "ques_type": "fill_in_blank"},
    }
    _write(folder / "problems.json", problems)
    _write(folder / "pid_splits.json", {"choose_txt_test": ["11", "12"], "fill_in_blank_test": ["21", "22"]})
    if kind == "text":  # a letter stands for its choice; fire and five are 1 edit of 4 apart
        answers = [("11", "(B)", ""), ("12", "fire", "")]
        return Case(folder, answers, {"all": {"accuracy": HALF, "anls": 100 * (1 + 0.75) / 2}})
    return Case(folder, [("21", "Four.", ""), ("22", "34", "")], {"all": {"accuracy": HALF, "anls": HALF}})


def pope(folder: Path) -> Path:
    """Write POPE's three files of two questions each."""
    for split in ("random", "popular", "adversarial"):
        lines = [
            {"question_id": n, "image": f"{n}.jpg", "text": f"Is there a {split} dog {n}?", "label": label}
            for n, label in ((1, "yes"), (2, "no"))
        ]
        _write_lines(folder / f"coco_pope_{split}.json", lines)
    return folder


def _pope(folder: Path) -> Case:
    said = {"random": ("Yes", "No, there is not."), "popular": ("yes. Not sure.", "yes"), "adversarial": ("no", "Yes")}
    answers = [(f"{split}/{n}", text, "") for split, texts in said.items() for n, text in enumerate(texts, 1)]
    return Case(
        pope(folder),
        answers,
        {
            "random": {"accuracy": 100.0, "f1": 100.0, "yes": HALF},
            "popular": {"accuracy": HALF, "precision": HALF, "recall": 100.0, "f1": 200 / 3, "yes": 100.0},
            "adversarial": {"accuracy": 0.0, "precision": 0.0, "recall": 0.0},
            "all": {"accuracy": HALF, "precision": HALF, "recall": 200 / 3, "f1": 400 / 7, "questions": 6},
        },
    )


def _mme(folder: Path) -> Case:
    lines = "Is there a dog? Please answer yes or no.\tYes\nIs there a cat?  Please answer yes or no.\tNo\n"
    for subtask in ("existence", "OCR", "code_reasoning"):
        where = folder / subtask / ("questions_answers_YN" if subtask == "OCR" else "")
        where.mkdir(parents=True)
        for image in ("1", "2"):
            (where / f"{image}.txt").write_text(lines)
    call = "\nAnswer the question using a single word or phrase."
    said = {
        "existence": ("Yes", "No", "yes, a dog", "Yes"),
        "OCR": ("Yes", "no", "yes", "No."),
        "code_reasoning": ("perhaps", "No", "No", "yes"),
    }
    answers = [
        (f"{subtask}/{image}.png", texts[2 * (image - 1) + place], question + call)
        for subtask, texts in said.items()
        for image in (1, 2)
        for place, question in enumerate(("Is there a dog?", "Is there a cat?"))
    ]
    return Case(
        folder,
        answers,
        {
            "existence": {"accuracy": 75.0, "acc+": HALF, "score": 125.0},
            "OCR": {"score": 200.0},
            "code_reasoning": {"accuracy": 25.0, "acc+": 0.0, "score": 25.0, "other": 1},
            "perception": {"score": 325.0, "questions": 8},
            "cognition": {"score": 25.0},
        },
    )


def _mmmu(folder: Path) -> Case:
    choices = {"A": "75 V", "B": "a red fox", "C": "none of these"}
    multiple = {"question_type": "multiple-choice", "all_choices": list(choices), "index2ans": choices}
    electronics = [
        {"id": "validation_Electronics_1", **multiple, "answer": "A"},
        {"id": "validation_Electronics_2", "question_type": "short-answer", "answer": "30"},
    ]
    _write(folder / "Electronics" / "output.json", electronics)
    _write(folder / "Art" / "output.json", [{"id": "validation_Art_1", **multiple, "answer": "B"}])
    return Case(
        folder,
        [
            ("validation_Electronics_1", "Not (B) but (A).", ""),
            ("validation_Electronics_2", "The current is 30 A", ""),
            ("validation_Art_1", "I think that it is a Red Fox", ""),
        ],
        {
            "all": {"accuracy": 100.0, "questions": 3},
            "Electronics": {"questions": 2},
            "Art and Design": {"questions": 1},
        },
    )


def _vsr(folder: Path) -> Case:
    lines = [
        {"image": "1.jpg", "caption": "The cat is on it.", "label": label, "relation": "on"} for label in (1, 0, 1)
    ]
    expected = {"all": {"accuracy": 200 / 3}, "true": {"accuracy": HALF}, "false": {"accuracy": 100.0}}
    return Case(_write_lines(folder / "test.jsonl", lines), _answers("True.", "no", "False"), expected)


def _snli_ve(folder: Path) -> Case:
    labels = ("entailment", "neutral")
    lines = [{"pairID": f"p#{n}", "gold_label": label, "Flickr30K_ID": "1"} for n, label in enumerate(labels)]
    answers = [("p#0", "Entailment", ""), ("p#1", "contradiction", "")]
    return Case(_write_lines(folder / "snli_ve_test.jsonl", lines), answers, {"all": {"accuracy": HALF}})


def _cifar10(folder: Path) -> Case:
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\nbird\n\n")
    (folder / "test_batch.bin").write_bytes(b"".join(bytes((label,)) + bytes(3072) for label in (2, 0)))
    return Case(folder, _answers("Bird.", "plane"), {"all": {"accuracy": HALF}, "bird": {"accuracy": 100.0}})


def _cifar100(folder: Path) -> Case:
    (folder / "fine_label_names.txt").write_text("apple\naquarium_fish\n")
    (folder / "test.bin").write_bytes(b"".join(bytes((4, label)) + bytes(3072) for label in (1, 0)))
    return Case(folder, _answers("aquarium fish", "pear"), {"all": {"accuracy": HALF, "questions": 2}})


def _mnist(folder: Path) -> Case:
    file = folder / "t10k-labels-idx1-ubyte"
    file.write_bytes(bytes((0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1)))
    return Case(file, _answers("Seven", "2.", "7"), {"all": {"accuracy": 200 / 3}, "7": {"accuracy": 100.0}})


def _hellaswag(folder: Path) -> Case:
    lines = [{"ind": n, "ctx": "He", "endings": list("wxyz"), "label": str(label)} for n, label in ((24, 3), (31, 0))]
    answers = [(24, "D", ""), (31, "B. x", "")]
    return Case(_write_lines(folder / "hellaswag_val.jsonl", lines), answers, {"all": {"accuracy": HALF}})


def _mmlu(folder: Path) -> Case:
    (folder / "test").mkdir()
    (folder / "test" / "anatomy_test.csv").write_text('"Which, of these?",1,2,3,4,B\n"Two\nlines",1,2,3,4,A\n')
    (folder / "test" / "virology_test.csv").write_text("Why?,1,2,3,4,D\n")
    answers = [("anatomy/0", "B", ""), ("anatomy/1", "B", ""), ("virology/0", "D. 4", "")]
    expected = {"all": {"accuracy": 200 / 3, "questions": 3}, "anatomy": {"accuracy": HALF}}
    return Case(folder, answers, expected)


def _vision_flan(folder: Path) -> Case:
    samples = [
        {
            "id": f"s{n}",
            "task_name": task,
            "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": v}],
        }
        for n, (task, v) in enumerate((("colours", "Red"), ("colours", "blue"), ("shapes", "a square")))
    ]
    answers = [("s0", "red.", ""), ("s1", "red", ""), ("s2", "A square", "")]
    expected = {"all": {"accuracy": 200 / 3}, "colours": {"accuracy": HALF}, "shapes": {"accuracy": 100.0}}
    return Case(_write(folder / "annotation_191-task_1k.json", samples), answers, expected)


def _own(folder: Path) -> Case:
    lines = [
        {"question_id": 7, "text": "What colour?", "answer": "Dark red", "task": "colours"},
        {"question_id": 8, "text": "How many?", "answer": ["2", "two"], "task": "numbers"},
        {"question_id": 9, "text": "How many?", "answer": "3"},
    ]
    expected = {"all": {"accuracy": 200 / 3}, "colours": {"accuracy": 100.0}, "numbers": {"accuracy": 100.0}}
    return Case(
        _write_lines(folder / "q.jsonl", lines), [(7, " dark red.", ""), (8, "Two", ""), (9, "33", "")], expected
    )


def make(task: str, folder: Path) -> Case:
    """Write the tiny benchmark of a name that a rule scores without further packages."""
    makers: dict[str, Any] = {
        "vqav2": lambda to: _vqa(to, "v2_mscoco_val2014_annotations.json"),
        "okvqa": lambda to: _vqa(to, "mscoco_val2014_annotations.json"),
        "iconqa_text": lambda to: _iconqa(to, "text"),
        "iconqa_blank": lambda to: _iconqa(to, "blank"),
        **{"textvqa": _textvqa, "vizwiz": _vizwiz, "gqa": _gqa, "scienceqa": _scienceqa, "pope": _pope, "mme": _mme},
        **{"scienceqa_img": _scienceqa_img, "mmmu": _mmmu, "vsr": _vsr, "snli_ve": _snli_ve, "cifar10": _cifar10},
        **{"cifar100": _cifar100, "mnist": _mnist, "hellaswag": _hellaswag, "mmlu": _mmlu},
        "vision_flan": _vision_flan,
        "exact_match": _own,
    }
    folder.mkdir(parents=True, exist_ok=True)
    case: Case = makers[task](folder)
    return case


SCORED = (
    *(
        "vqav2",
        "okvqa",
        "textvqa",
        "vizwiz",
        "gqa",
        "scienceqa",
        "scienceqa_img",
        "iconqa_text",
        "iconqa_blank",
        "pope",
    ),
    *("mme", "mmmu", "vsr", "snli_ve", "cifar10", "cifar100", "mnist", "hellaswag", "mmlu", "vision_flan"),
    "exact_match",
)


def approx(values: dict[str, float]) -> Any:
    """Return numbers that others are equal to if they differ by rounding alone."""
    return pytest.approx(values, abs=1e-9)
