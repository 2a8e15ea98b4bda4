"""Exact match, ANLS and ROUGE-L: `evaluation/scores/exact_match.py`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from benchmark_folders import make

from llava_steering_plugin.evaluation.benchmark import Pair
from llava_steering_plugin.evaluation.scores.exact_match import anls, gqa_answer, vision_flan_metrics
from llava_steering_plugin.evaluation.scoring import score


@pytest.mark.parametrize(
    ("answer", "right", "value"),
    [
        ("kitten", "sitting", 1 - 3 / 7),  # the textbook's example: three edits
        ("Red ", "red", 1.0),
        ("abcd", "ab", 0.5),
        ("abc", "a", 0.0),  # 1 / 3 is below the threshold
        ("", "", 1.0),
        ("", "a", 0.0),
    ],
)
def test_anls_is_the_similarity_by_edits_from_one_half_on(answer: str, right: str, value: float) -> None:
    assert anls(answer, right) == pytest.approx(value) == anls(right, answer)


def test_gqas_clean_up_is_that_of_llava() -> None:
    assert [gqa_answer(text) for text in ("Red.", "the Red", " red")] == ["red", "the red", " red"]


@pytest.mark.parametrize(
    ("said", "right"),
    [("B", True), ("(b)", True), ("B.", True), ("sphere", True), ("A", False), ("C", False), ("(cube)", False)],
)
def test_a_letter_stands_for_a_choice_of_iconqa(said: str, right: bool, tmp_path: Path) -> None:
    case = make("iconqa_text", tmp_path / "official")
    line = {"question_id": "11", "text": said}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    found = score("iconqa_text", tmp_path / "a.jsonl", case.annotations, allow_missing=True)
    assert found.metrics["all"]["accuracy"] == 100 * right


def test_vision_flan_has_rouge_where_its_package_is_and_says_where_it_is_not(tmp_path: Path) -> None:
    case = make("vision_flan", tmp_path / "official")
    found = score("vision_flan", case.write_answers(tmp_path / "a.jsonl"), case.annotations)
    installed = importlib.util.find_spec("rouge_score") is not None
    assert ("rougeL" in found.metrics["all"]) is installed
    assert (found.notes == ()) is installed


def test_rouge_is_that_of_the_package() -> None:
    pytest.importorskip("rouge_score")
    reference = {"answer": "the red cat sat", "task": "t"}
    found = vision_flan_metrics([Pair("1", reference, "the red dog sat"), Pair("2", reference, "the red cat sat")])
    assert found["all"]["rougeL"] == pytest.approx(100 * (0.75 + 1) / 2) == found["t"]["rougeL"]
