"""Score answers to a user's own questions by exact match to the reference answers.

The rule is that of Vision-Flan here: texts are compared in lower case, without white space and full stops at their
ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.evaluation.benchmark import Metrics, Pair, Points, References, Wanted, accuracies
from llava_steering_plugin.evaluation.official_files import keyed, read_json, read_lines, reading, text_of
from llava_steering_plugin.evaluation.scores.exact_match import plain

IDS = ("question_id", "id")
GROUPS = ("task", "task_name", "category")


def read_own(source: Path, wanted: Wanted) -> References:
    """Read reference answers from LLaVA's training data, or from a question file whose lines have `answer`.

    `answer` is a text, or a list of texts of which each is right; of a sample with `conversations` it is the first
    answer. `question_id` or `id` is the id, and `task`, `task_name` or `category` the group.

    Raises:
        DataError: the file is missing, damaged, or lacks answers.
    """
    if source.is_dir():
        raise DataError(
            f"{source} holds no questions: it is a folder. Give LLaVA's JSON, or a question file with answers."
        )
    with reading(source), source.open(encoding="utf-8-sig") as file:
        is_list = file.read(1024).lstrip().startswith("[")
    entries = read_json(source, list, "a list of samples") if is_list else read_lines(source)
    with reading(source):
        return References(keyed(source, (_reference(entry) for entry in entries)))


def _reference(entry: Any) -> tuple[Any, dict[str, Any]]:
    if not isinstance(entry, dict):
        raise TypeError(f"{entry!r} is no sample")
    identity = next((entry[name] for name in IDS if name in entry), None)
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise ValueError(f"a sample has no question_id or id that is text or a whole number, but {identity!r}")
    group = next((entry[name] for name in GROUPS if entry.get(name) is not None), None)
    answers = _answers(entry)
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"sample {identity} has no answer")
    return identity, {"answers": answers, "group": None if group is None else str(group)}


def _answers(entry: Mapping[str, Any]) -> list[Any]:
    if "answer" in entry:
        return entry["answer"] if isinstance(entry["answer"], list) else [entry["answer"]]
    return [text_of(turn, "value") for turn in entry["conversations"] if turn["from"] == "gpt"][:1]


def own_points(pairs: Sequence[Pair]) -> Points:
    """Tell which answers match a reference answer exactly, in lower case and without full stops at their ends."""
    return {pair.key: float(plain(pair.text) in map(plain, pair.reference["answers"])) for pair in pairs}


def own_metrics(pairs: Sequence[Pair]) -> Metrics:
    """Return the accuracy of all questions, and of each group that the data names."""
    groups = {pair.key: pair.reference["group"] for pair in pairs if pair.reference["group"] is not None}
    return accuracies(own_points(pairs), groups)
