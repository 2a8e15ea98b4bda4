"""Benchmarks whose answers a judge model scores: MM-Vet and HallusionBench. Here the file is made that it takes.

Sources: MM-Vet (arXiv 2308.02490, github.com/yuweihao/MM-Vet, `mm-vet_evaluator.py`), HallusionBench (arXiv 2310.14566,
github.com/tianyi-lab/HallusionBench, `evaluation.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_steering_plugin.evaluation.benchmark import GivenAnswer, Pair, References, Wanted
from llava_steering_plugin.evaluation.official_files import keyed, official, read_json, reading, text_of

PREFIX = "v1_"


def read_mmvet(source: Path, wanted: Wanted) -> References:
    """Read MM-Vet's questions by id; LLaVA's question file has the ids without "v1_".

    Raises:
        DataError: the file is missing, damaged, or of another layout.
    """
    path = official(source, "mm-vet.json")
    questions = read_json(path, dict, "an object of questions by id")
    with reading(path):
        items = keyed(path, ((key, text_of(question, "question")) for key, question in questions.items()))

    def find(answer: GivenAnswer) -> str | None:
        return next((key for key in (answer.id, PREFIX + answer.id) if key in items), None)

    return References(items, find=find)


def mmvet_submission(pairs: Sequence[Pair]) -> dict[str, str]:
    """Return what MM-Vet's evaluator takes: the answers by the official ids."""
    return {pair.key: pair.text for pair in pairs}


def read_hallusionbench(source: Path, wanted: Wanted) -> References:
    """Read HallusionBench's questions. CATEGORY/SUBCATEGORY/SET_FIGURE_QUESTION is the id, such as VD/illusion/0_1_0.

    Raises:
        DataError: the file is missing, damaged, or of another layout.
    """
    path = official(source, "HallusionBench.json")
    entries = read_json(path, list, "a list of questions")
    with reading(path):
        return References(keyed(path, ((_hallusion_key(entry), entry) for entry in entries)))


def _hallusion_key(entry: dict[str, Any]) -> str:
    place = "_".join(str(entry[name]) for name in ("set_id", "figure_id", "question_id"))
    return f"{entry['category']}/{entry['subcategory']}/{place}"


def hallusionbench_submission(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Return what HallusionBench's evaluation takes: its own entries, with the answers as `model_prediction`."""
    return [{**pair.reference, "model_prediction": pair.text} for pair in pairs]
