"""ScienceQA's accuracy is that of LLaVA's own program; letters elsewhere: `evaluation/scores/letters.py`."""

from __future__ import annotations

import json
import random
import re
import runpy
from pathlib import Path

import pytest
from benchmark_folders import scienceqa, write_answers

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.evaluation.benchmark import Wanted
from llava_steering_plugin.evaluation.scores.letters import letter_of, read_mmlu, read_scienceqa
from llava_steering_plugin.evaluation.scoring import score

TEXTS = {
    "A": "A",
    "B. because": "B",
    "B.": None,
    "The answer is C.": "C",
    "The answer is A. The answer is B.": None,
    "(A)": None,
    "a": None,
    "": None,
    "F": None,
    "The answer is F.": "F",
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_letter_is_read_as_llava_reads_it(text: str) -> None:
    assert letter_of(text) == TEXTS[text]


def test_scienceqa_has_the_accuracy_that_llavas_program_prints(
    tmp_path: Path, pristine_llava: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(1)
    problems = {
        str(n): {
            "choices": list("vwxyz")[: draw.randint(2, 5)],
            "answer": draw.randint(0, 1),
            "image": draw.choice([None, "i"]),
        }
        for n in range(60)
    }
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
    mark = {None: "Which?", "i": "<image>\nWhich?"}
    answers = [(key, draw.choice(list(TEXTS)), mark[each["image"]]) for key, each in problems.items()]
    write_answers(tmp_path / "a.jsonl", answers)
    ours = score("scienceqa", tmp_path / "a.jsonl", tmp_path).metrics

    files = {"base-dir": "", "result-file": "a.jsonl", "output-file": "o.json", "output-result": "r.json"}
    words = [word for name, file in files.items() for word in (f"--{name}", str(tmp_path / file))]
    monkeypatch.setattr("sys.argv", ["eval_science_qa", *words])
    runpy.run_path(str(pristine_llava / "llava/eval/eval_science_qa.py"), run_name="__main__")
    accuracy, of_images = map(float, re.findall(r"([\d.]+)%", capsys.readouterr().out))
    assert ours["all"]["accuracy"] == pytest.approx(accuracy, abs=0.005)
    assert ours["with an image"]["accuracy"] == pytest.approx(of_images, abs=0.005)
    assert 0 < accuracy < 100


def test_a_split_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert list(read_scienceqa(scienceqa(tmp_path), Wanted("train")).items) == ["5"]
    with pytest.raises(DataError, match=r"pid_splits\.json is in another layout than the official one: no 'minitest'"):
        read_scienceqa(tmp_path, Wanted("minitest"))


@pytest.mark.parametrize("row", ["What?,1,2,3,B", "What?,1,2,3,4,E", "What?,1,2,3,4,", '"What?,1,2'])
def test_a_row_of_mmlu_that_is_no_question_is_named(row: str, tmp_path: Path) -> None:
    (tmp_path / "anatomy_test.csv").write_text(f"What?,1,2,3,4,B\n{row}\n")
    with pytest.raises(DataError, match=r"anatomy_test\.csv .*row 1 is no question"):
        read_mmlu(tmp_path, Wanted())
