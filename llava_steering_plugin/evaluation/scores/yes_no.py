"""POPE: does the model see objects that are not there?

Source: POPE (arXiv 2305.10355, github.com/RUCAIBox/POPE, `evaluate.py`); LLaVA's `llava/eval/eval_pope.py` is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.evaluation.benchmark import ALL, GivenAnswer, Metrics, Pair, Points, References, Wanted
from llava_steering_plugin.evaluation.official_files import keyed, read_lines, reading, text_of

SPLITS = ("random", "popular", "adversarial")
NO = {"No", "not", "no"}


def says_yes(text: str) -> bool:
    """Tell whether an answer is taken as a yes: its first sentence has none of the words No, no and not in it."""
    return not NO & set(text.partition(".")[0].replace(",", "").split(" "))


def read_pope(source: Path, wanted: Wanted) -> References:
    """Read POPE's files coco_pope_SPLIT.json, one question a line. SPLIT/QUESTION_ID is the id.

    LLaVA's question file numbers the questions otherwise: with `wanted.questions`, the ids are that file's, and its
    questions of each category are those of the split, in the same order.

    Raises:
        DataError: the files are missing, damaged, of another layout, or do not fit each other.
    """
    folder = source / "coco" if (source / "coco").is_dir() else source
    files = {split: folder / f"coco_pope_{split}.json" for split in SPLITS}
    found = {split: file for split, file in files.items() if file.is_file()}
    if not found:
        raise DataError(f"{source} holds no coco_pope_SPLIT.json of {', '.join(SPLITS)}. Is it POPE's output/coco?")
    references: list[tuple[Any, Any]] = []
    for split, file in found.items():
        lines = read_lines(file)
        with reading(file):
            for line in lines:
                if line["label"] not in ("yes", "no"):
                    raise ValueError(f"its label {line['label']!r} is neither yes nor no")
                item = {"yes": line["label"] == "yes", "split": split, "text": text_of(line, "text")}
                references.append((f"{split}/{line['question_id']}", item))
    items = keyed(folder, references)
    keys = None if wanted.questions is None else _keys_by_id(wanted.questions, items)

    def find(answer: GivenAnswer) -> str | None:
        if keys is not None:
            return keys.get(answer.id)
        return answer.id if answer.id in items else None

    return References(items, find=find)


def _keys_by_id(file: Path, items: dict[str, Any]) -> dict[str, str]:
    """Return the key of each id of LLaVA's question file."""
    waiting = {split: [key for key, item in items.items() if item["split"] == split] for split in SPLITS}
    place = dict.fromkeys(SPLITS, 0)
    found = {}
    questions = read_lines(file)
    with reading(file):
        for question in questions:
            split, asked = question["category"], text_of(question, "text").partition("\n")[0].strip()
            if place[split] < len(waiting[split]):
                key = waiting[split][place[split]]
                if items[key]["text"].strip() != asked:
                    raise ValueError(f"question {question['question_id']} asks {asked!r}, and {key} is another")
                found[str(question["question_id"])] = key
            place[split] += 1
    return found


def pope_points(pairs: Sequence[Pair]) -> Points:
    """Tell which questions are answered right."""
    return {pair.key: float(says_yes(pair.text) == pair.reference["yes"]) for pair in pairs}


def pope_metrics(pairs: Sequence[Pair]) -> Metrics:
    """Return accuracy, precision, recall, F1 and the share of yes: of all questions, and of each split.

    The row for all questions is over all of them together; papers mostly give the mean of the splits' F1, which stands
    beside it.
    """
    metrics = {ALL: _counts(pairs)}
    for split in SPLITS:
        if members := [pair for pair in pairs if pair.reference["split"] == split]:
            metrics[split] = _counts(members)
    values = [metrics[split]["f1"] for split in metrics if split != ALL]
    known = [value for value in values if value is not None]
    metrics[ALL]["mean f1"] = sum(known) / len(known) if known and len(known) == len(values) else None
    return metrics


def _counts(pairs: Sequence[Pair]) -> dict[str, float | int | None]:
    outcomes = [(says_yes(pair.text), pair.reference["yes"]) for pair in pairs]
    true_yes, false_yes = outcomes.count((True, True)), outcomes.count((True, False))
    true_no, false_no = outcomes.count((False, False)), outcomes.count((False, True))
    return {
        "accuracy": _share(true_yes + true_no, len(pairs)),
        "precision": _share(true_yes, true_yes + false_yes),
        "recall": _share(true_yes, true_yes + false_no),
        "f1": _share(2 * true_yes, 2 * true_yes + false_yes + false_no) if true_yes else None,
        "yes": _share(true_yes + false_yes, len(pairs)),
        "questions": len(pairs),
    }


def _share(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None
