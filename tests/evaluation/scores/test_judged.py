"""The files that judge models take: `evaluation/scores/judged.py`."""

from __future__ import annotations

import json
from pathlib import Path

from benchmark_folders import write_answers

from llava_steering_plugin.evaluation.scoring import score

HALLUSION = {
    **{"category": "VD", "subcategory": "illusion", "visual_input": "1", "set_id": "0", "figure_id": "1"},
    **{"sample_note": "circle", "question": "Is it the same?", "gt_answer": "1", "gt_answer_details": "It is."},
    "filename": "./hallusion_bench/VD/illusion/0_1.png",
}


def test_mmvet_takes_the_answers_by_its_own_ids(tmp_path: Path) -> None:
    questions = {f"v1_{n}": {"question": "What?", "answer": "x", "capability": ["ocr"]} for n in range(3)}
    (tmp_path / "mm-vet.json").write_text(json.dumps(questions))
    answers = write_answers(tmp_path / "a.jsonl", [(0, "zero", ""), ("v1_2", "two", "")])
    found = score("mmvet", answers, tmp_path, submission=True, allow_missing=True)
    assert found.submission == {"v1_0": "zero", "v1_1": "", "v1_2": "two"}
    assert found.metrics == {} and "a judge model scores the submission" in found.notes


def test_hallusionbench_takes_its_own_entries_with_the_answers(tmp_path: Path) -> None:
    entries = [{**HALLUSION, "question_id": str(n)} for n in range(2)]
    (tmp_path / "HallusionBench.json").write_text(json.dumps(entries))
    answers = [(f"VD/illusion/0_1_{n}", text, "") for n, text in enumerate(("Yes.", "No."))]
    found = score("hallusionbench", write_answers(tmp_path / "a.jsonl", answers), tmp_path, submission=True)
    assert found.submission == [
        {**entries[0], "model_prediction": "Yes."},
        {**entries[1], "model_prediction": "No."},
    ]
