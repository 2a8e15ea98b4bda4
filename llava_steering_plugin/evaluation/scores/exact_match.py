"""Exact match: GQA, IconQA and Vision-Flan; IconQA also by ANLS, Vision-Flan also by ROUGE-L.

Sources: GQA (arXiv 1902.09506, its `eval.py`: accuracy over the balanced questions, open and binary ones apart), after
the clean-up of LLaVA's `scripts/convert_gqa_for_eval.py`; IconQA (arXiv 2110.13214, github.com/lupantech/IconQA,
`tools/sub_acc.py`); ANLS (arXiv 1907.00490, threshold 0.5), which evaluation suites report for IconQA; Vision-Flan
(arXiv 2402.11690), whose paper gives no exact rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_steering_plugin.evaluation.benchmark import (
    ALL,
    Metrics,
    Pair,
    Points,
    References,
    Wanted,
    accuracies,
    percent,
)
from llava_steering_plugin.evaluation.official_files import keyed, official, read_json, reading, text_of

ANLS_THRESHOLD = 0.5


def plain(text: str) -> str:
    """Return a text in lower case, without white space and full stops at its end."""
    return text.strip().rstrip(".").strip().lower()


def gqa_answer(text: str) -> str:
    """Clean an answer as LLaVA does before GQA's evaluation compares it."""
    return text.rstrip(".").lower()


def read_gqa(source: Path, wanted: Wanted) -> References:
    """Read GQA's questions: an object of questions by id, as in testdev_balanced_questions.json.

    Raises:
        DataError: the file is missing, damaged, or of another layout.
    """
    path = official(source, "testdev_balanced_questions.json")
    questions = read_json(path, dict, "an object of questions by id")
    with reading(path):
        secret = not any("answer" in question for question in questions.values())
        items = keyed(path, ((key, _gqa_reference(question, secret)) for key, question in questions.items()))
    return References(items, secret=secret)


def _gqa_reference(question: Mapping[str, Any], secret: bool) -> dict[str, Any]:
    text_of(question, "question")
    if secret:
        return {}
    kind = "open" if question["types"]["structural"] == "query" else "binary"
    return {"answer": text_of(question, "answer"), "type": kind, "balanced": bool(question.get("isBalanced", True))}


def gqa_points(pairs: Sequence[Pair]) -> Points:
    """Tell which of the balanced questions are answered right."""
    balanced = (pair for pair in pairs if pair.reference["balanced"])
    return {pair.key: float(gqa_answer(pair.text) == pair.reference["answer"]) for pair in balanced}


def gqa_metrics(pairs: Sequence[Pair]) -> Metrics:
    """Return the accuracy of the balanced questions, and of open and binary ones."""
    points = gqa_points(pairs)
    return accuracies(points, {pair.key: pair.reference["type"] for pair in pairs if pair.key in points})


def gqa_submission(pairs: Sequence[Pair]) -> list[dict[str, str]]:
    """Return what GQA's evaluation and its test server take."""
    return [{"questionId": pair.key, "prediction": gqa_answer(pair.text)} for pair in pairs]


def read_iconqa_text(source: Path, wanted: Wanted) -> References:
    """Read IconQA's questions with a choice of texts; `split` is test, val or train.

    Raises:
        DataError: the files are missing, damaged, or of another layout.
    """
    return _read_iconqa(source, "choose_txt", wanted.split or "test")


def read_iconqa_blank(source: Path, wanted: Wanted) -> References:
    """Read IconQA's questions with a blank to fill; `split` is test, val or train.

    Raises:
        DataError: the files are missing, damaged, or of another layout.
    """
    return _read_iconqa(source, "fill_in_blank", wanted.split or "test")


def _read_iconqa(source: Path, task: str, split: str) -> References:
    path = official(source, "problems.json", "iconqa_data/problems.json")
    problems = read_json(path, dict, "an object of problems by number")
    splits = read_json(path.with_name("pid_splits.json"), dict, "an object of splits")
    with reading(path.with_name("pid_splits.json")):
        numbers = splits[f"{task}_{split}"]
    with reading(path):
        return References(keyed(path, ((number, _iconqa_reference(problems[str(number)])) for number in numbers)))


def _iconqa_reference(problem: Mapping[str, Any]) -> dict[str, Any]:
    answer, choices = problem["answer"], problem.get("choices") or []
    if choices:  # the answer is the place of one of them
        return {"answer": str(choices[int(answer)]), "choices": [str(choice) for choice in choices]}
    return {"answer": str(answer), "choices": []}


def _iconqa_answer(text: str, choices: Sequence[str]) -> str:
    """Return an answer as it is compared; a letter, alone or in brackets, stands for a choice."""
    said = text.strip().strip("().").strip()
    if len(said) == 1 and said.isalpha() and said not in choices and ord(said.upper()) - ord("A") < len(choices):
        return plain(choices[ord(said.upper()) - ord("A")])
    return plain(text)


def _compared(pair: Pair) -> tuple[str, str]:
    """Return the answer to a question of IconQA and the right one, as they are compared."""
    return _iconqa_answer(pair.text, pair.reference["choices"]), plain(pair.reference["answer"])


def iconqa_points(pairs: Sequence[Pair]) -> Points:
    """Tell which answers match exactly, in lower case."""
    compared = {pair.key: _compared(pair) for pair in pairs}
    return {key: float(said == right) for key, (said, right) in compared.items()}


def iconqa_metrics(pairs: Sequence[Pair]) -> Metrics:
    """Return the accuracy by exact match, in lower case, and the ANLS."""
    exact, near = iconqa_points(pairs), [anls(*_compared(pair)) for pair in pairs]
    return {ALL: {"accuracy": percent(list(exact.values())), "anls": percent(near), "questions": len(pairs)}}


def anls(answer: str, right: str) -> float:
    """Return the normalised Levenshtein similarity of two texts: 0 where it is below the threshold."""
    one, other = answer.lower().strip(), right.lower().strip()
    longest = max(len(one), len(other))
    similarity = 1 - _distance(one, other) / longest if longest else 1.0
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def _distance(one: str, other: str) -> int:
    """Return the edit distance of two texts, by Wagner and Fischer's rows."""
    row = list(range(len(other) + 1))
    for line, character in enumerate(one, 1):
        above, row = row, [line]
        for place, another in enumerate(other, 1):
            row.append(min(above[place] + 1, row[-1] + 1, above[place - 1] + (character != another)))
    return row[-1]


def read_vision_flan(source: Path, wanted: Wanted) -> References:
    """Read samples in LLaVA's layout, as Vision-Flan is released: the first answer of each is its reference.

    Raises:
        DataError: the file is missing, damaged, or of another layout.
    """
    path = official(source, "annotation_191-task_1k.json")
    samples = read_json(path, list, "a list of samples")
    with reading(path):
        return References(keyed(path, ((sample["id"], _sample_reference(sample)) for sample in samples)))


def _sample_reference(sample: Mapping[str, Any]) -> dict[str, Any]:
    said = [text_of(turn, "value") for turn in sample["conversations"] if turn["from"] == "gpt"]
    if not said:
        raise ValueError(f"sample {sample['id']} has no answer")
    return {"answer": said[0], "task": sample.get("task_name", sample.get("task"))}


def vision_flan_points(pairs: Sequence[Pair]) -> Points:
    """Tell which answers match exactly, in lower case and without full stops at their ends."""
    return {pair.key: float(plain(pair.text) == plain(pair.reference["answer"])) for pair in pairs}


def vision_flan_metrics(pairs: Sequence[Pair]) -> Metrics:
    """Return the accuracy by exact match of all samples and of each task, and ROUGE-L if rouge-score is installed."""
    points = vision_flan_points(pairs)
    tasks = {pair.key: str(pair.reference["task"]) for pair in pairs if pair.reference["task"] is not None}
    metrics = accuracies(points, tasks)
    if (scorer := _rouge_scorer()) is not None:
        rouge = {pair.key: scorer.score(pair.reference["answer"], pair.text)["rougeL"].fmeasure for pair in pairs}
        for group, values in metrics.items():
            values["rougeL"] = percent([rouge[key] for key in rouge if group in (ALL, tasks.get(key))])
    return metrics


def _rouge_scorer() -> Any:
    """Return what computes ROUGE-L; None: its package, or one that it needs, is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return None
    return RougeScorer(["rougeL"], use_stemmer=True)


def without_rouge() -> list[str]:
    """Return a note if ROUGE-L cannot be computed here."""
    if _rouge_scorer() is not None:
        return []
    return ["without ROUGE-L, which needs the package rouge-score: pip install 'llava-steering-plugin[scores]'"]
