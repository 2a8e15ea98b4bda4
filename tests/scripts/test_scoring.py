"""Answers are scored by kind of question (`experiments.scoring`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_accuracy_counts_exact_answers_by_kind_and_refuses_another_set_of_questions(tmp_path: Path) -> None:
    from experiments.scoring import accuracy
    from experiments.world import KINDS

    expected, answers = tmp_path / "expected.json", tmp_path / "answers.jsonl"
    wanted = [("red", "colour"), ("blue", "colour"), ("circle", "shape"), ("yes", "yes/no")]
    expected.write_text(json.dumps([{"answer": answer, "kind": kind} for answer, kind in wanted]))
    lines = [
        json.dumps({"question_id": place, "text": text}) for place, text in enumerate(("Red", "red", "circle", "no"))
    ]
    answers.write_text("\n".join(lines))
    assert accuracy(answers, expected, KINDS) == {"all": 0.5, "colour": 0.5, "shape": 1.0, "yes/no": 0.0}
    answers.write_text("\n".join(lines[:3]))
    with pytest.raises(ValueError, match="3 answers"):
        accuracy(answers, expected, KINDS)


def test_questions_are_written_as_upstream_reads_them_and_score_in_full_if_answered_right(tmp_path: Path) -> None:
    from experiments.scoring import Asked, accuracy, write_questions

    asked = [
        Asked("test/3.png", "what color is it?", "red", "colour"),
        Asked("test/4.png", "a circle?", "yes", "yes/no"),
    ]
    write_questions(tmp_path, asked)
    lines = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert lines == [
        {"question_id": 0, "image": "test/3.png", "text": "what color is it?"},
        {"question_id": 1, "image": "test/4.png", "text": "a circle?"},
    ]
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        "".join(json.dumps({"question_id": n, "text": one.answer}) + "\n" for n, one in enumerate(asked))
    )
    assert accuracy(answers, tmp_path / "answers.json", ("colour", "yes/no")) == {"all": 1, "colour": 1, "yes/no": 1}


def test_parameters_are_counted_without_the_fingerprint_and_without_what_is_left_out(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from experiments.scoring import parameters

    tensors = {"layers.0.a": (2, 3), "layers.0.router_a": (4, 5), "fingerprint.rows": (6,)}
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "adapter_model.safetensors")
    assert parameters(tmp_path) == 26
    assert parameters(tmp_path, without="router_") == 6
