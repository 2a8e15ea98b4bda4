"""POPE's numbers are those of LLaVA's own program: `evaluation/scores/yes_no.py`."""

from __future__ import annotations

import json
import random
import re
import runpy
from pathlib import Path

import pytest
from benchmark_folders import write_answers

from llava_steering_plugin.evaluation.benchmark import Pair
from llava_steering_plugin.evaluation.scores.yes_no import pope_metrics, says_yes
from llava_steering_plugin.evaluation.scoring import score

TEXTS = {
    **{"Yes": True, "No": False, "no, there is not": False, "Yes. There is no cat.": True, "It is not there": False},
    **{"Nothing": True, "NO": True, "nope": True, "": True},
}


@pytest.mark.parametrize("text", TEXTS)
def test_an_answer_is_a_yes_unless_its_first_sentence_has_one_of_three_words(text: str) -> None:
    assert says_yes(text) is TEXTS[text]


def test_each_split_has_the_numbers_that_llavas_program_prints(
    tmp_path: Path, pristine_llava: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(0)
    folder = tmp_path / "coco"
    folder.mkdir()
    questions, answers = [], []
    for split in ("random", "popular", "adversarial"):
        labels = [draw.choice(("yes", "no")) for _ in range(40)]
        lines = [{"question_id": n, "text": f"{split} {n}?", "label": label} for n, label in enumerate(labels)]
        (folder / f"coco_pope_{split}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for line in lines:
            questions.append({"question_id": len(questions), "text": line["text"], "category": split})
            answers.append((len(answers), draw.choice(list(TEXTS)), ""))
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    write_answers(tmp_path / "a.jsonl", answers)
    ours = score("pope", tmp_path / "a.jsonl", tmp_path, questions=tmp_path / "q.jsonl").metrics

    files = {"annotation-dir": folder, "question-file": tmp_path / "q.jsonl", "result-file": tmp_path / "a.jsonl"}
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    monkeypatch.setattr("sys.argv", ["eval_pope", *words])
    runpy.run_path(str(pristine_llava / "llava/eval/eval_pope.py"), run_name="__main__")
    shown = capsys.readouterr().out
    for part in shown.split("Category: ")[1:]:
        split = part.split(",")[0]
        found = {name.lower(): 100 * float(value) for name, value in re.findall(r"^(\w[\w ]+): ([\d.]+)$", part, re.M)}
        assert ours[split]["f1"] == pytest.approx(found["f1 score"])
        assert ours[split]["yes"] == pytest.approx(found["yes ratio"])
        for name in ("accuracy", "precision", "recall"):
            assert ours[split][name] == pytest.approx(found[name])
    assert shown.count("Category") == 3
    assert ours["all"]["mean f1"] == pytest.approx(sum(float(ours[split]["f1"] or 0) for split in list(ours)[1:]) / 3)


def test_what_is_undefined_is_none_where_the_official_program_divides_by_zero() -> None:
    found = pope_metrics([Pair("random/1", {"yes": True, "split": "random"}, "no")])["random"]
    assert (found["accuracy"], found["precision"], found["recall"], found["f1"]) == (0, None, 0, None)
