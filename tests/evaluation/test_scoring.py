"""`llava-steering score`: every benchmark in its official layout, and what is refused.

Covers `cli/score.py`, `evaluation/registry.py`, `evaluation/benchmark.py` and `evaluation/scoring.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_folders import SCORED, Case, approx, make, pope, write_answers
from typer.testing import CliRunner, Result

from llava_steering_plugin.cli import app
from llava_steering_plugin.errors import ArgumentsError, DataError, SteeringError
from llava_steering_plugin.evaluation.registry import BENCHMARKS
from llava_steering_plugin.evaluation.scoring import score, write_json


def run(*words: object) -> Result:
    done = CliRunner().invoke(app, ["score", *map(str, words)])
    if isinstance(done.exception, SteeringError):
        raise done.exception
    return done


@pytest.mark.parametrize("task", SCORED)
def test_a_benchmark_in_its_official_layout_scores_as_its_rule_says(task: str, tmp_path: Path) -> None:
    case = make(task, tmp_path / "official")
    answers, output = case.write_answers(tmp_path / "answer.jsonl"), tmp_path / "made" / "scores.json"
    done = run(task, answers, "--annotations", case.annotations, "--output", output, *case.options)
    assert done.exit_code == 0, done.output
    found = json.loads(output.read_text())
    assert found.keys() == {"task", "answers", "missing", "failed", "metrics", "notes"}
    assert (found["task"], found["answers"], found["missing"]) == (task, len(case.answers), 0)
    for group, values in case.expected.items():
        assert {name: found["metrics"][group][name] for name in values} == approx(values), group
    assert f"{len(case.answers)} answers, 0 missing" in done.stdout and str(output) in done.stdout
    assert all(group in done.stdout for group in case.expected)


def points_in(file: Path) -> dict[str, float]:
    """Return the scores of a file of `--per-question`, by question."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(line.keys() == {"question_id", "score"} for line in lines)
    return {line["question_id"]: line["score"] for line in lines}


@pytest.mark.parametrize("task", SCORED)
def test_the_mean_of_the_questions_scores_is_the_number_that_is_reported(task: str, tmp_path: Path) -> None:
    case, file = make(task, tmp_path / "official"), tmp_path / "made" / "points.jsonl"
    answers, output = case.write_answers(tmp_path / "answer.jsonl"), tmp_path / "scores.json"
    written = ("--per-question", file, "--output", output)
    done = run(task, answers, "--annotations", case.annotations, *written, *case.options)
    points, found = points_in(file), json.loads(output.read_text())
    assert all(0 <= point <= 1 for point in points.values()) and str(file) in done.stdout
    mean = 100 * sum(points.values()) / len(points)
    assert found["per_question"] == {"metric": "accuracy", "mean": approx(mean), "questions": len(points)}
    if task == "mme":  # each subtask has an accuracy, and all of them together have none
        for subtask in ("existence", "OCR", "code_reasoning"):
            of_subtask = [point for key, point in points.items() if key.startswith(f"{subtask}/")]
            assert 100 * sum(of_subtask) / len(of_subtask) == approx(found["metrics"][subtask]["accuracy"])
        return
    assert mean == approx(found["metrics"]["all"]["accuracy"])
    assert len(points) == found["metrics"]["all"].get("questions", len(points))


def test_scores_of_questions_are_those_of_the_rule_under_the_ids_of_the_annotations(tmp_path: Path) -> None:
    vqa, mme = make("vqav2", tmp_path / "vqa"), make("mme", tmp_path / "mme")
    found = score("vqav2", vqa.write_answers(tmp_path / "a.jsonl"), vqa.annotations, per_question=True).points
    assert found == approx({"1": (3 * 2 / 3 + 7) / 10, "2": 1.0, "3": (2 / 3 + 8 * 2 / 3) / 10})
    found = score("mme", mme.write_answers(tmp_path / "a.jsonl"), mme.annotations, per_question=True).points
    assert found is not None and len(found) == len(mme.answers)
    assert (found["existence/1: Is there a dog?"], found["existence/2: Is there a cat?"]) == (1, 0)
    assert score("mme", tmp_path / "a.jsonl", mme.annotations).points is None


def test_these_are_all_benchmarks_but_those_for_a_judge_and_for_pycocoevalcap() -> None:
    assert set(BENCHMARKS) - set(SCORED) == {"mmvet", "hallusionbench", "flickr30k"}


def damaged(case: Case, folder: Path, *more: tuple[Any, str, str]) -> Path:
    return write_answers(folder / "answer.jsonl", [*case.answers[1:], *more])


def test_missing_strange_and_double_answers_come_in_one_message_and_nothing_is_written(tmp_path: Path) -> None:
    case = make("gqa", tmp_path / "official")
    answers = damaged(case, tmp_path, ("03", "yes", ""), ("99", "yes", ""))
    with pytest.raises(DataError) as caught:
        run("gqa", answers, "--annotations", case.annotations, "--output", tmp_path / "scores.json")
    text = str(caught.value)
    assert "1 of 4 answers are to no question: 99 (line 4)" in text
    assert "1 answers are to a question that has one already: 03 (lines 1 and 3)" in text
    assert "1 of 3 questions have no answer: 02." in text and "--allow-missing" in text
    assert {file.name for file in tmp_path.iterdir()} == {"official", "answer.jsonl"}


def test_allow_missing_scores_the_others_alone_and_says_so(tmp_path: Path) -> None:
    case = make("gqa", tmp_path / "official")
    done = run("gqa", damaged(case, tmp_path), "--annotations", case.annotations, "--allow-missing")
    assert "2 answers, 1 missing" in done.stdout
    assert "note: 1 of 3 questions have no answer and are left out" in done.stdout
    found = score("gqa", tmp_path / "answer.jsonl", case.annotations, allow_missing=True)
    assert found.metrics["all"] == {"accuracy": 0.0, "questions": 1}


def test_answers_of_another_benchmark_are_told(tmp_path: Path) -> None:
    gqa, vqa = make("gqa", tmp_path / "gqa"), make("vqav2", tmp_path / "vqa")
    answers = gqa.write_answers(tmp_path / "answer.jsonl")
    with pytest.raises(DataError, match=r"3 of 3 answers are to no question: the annotations are of another split"):
        run("vqav2", answers, "--annotations", vqa.annotations)


def test_damaged_answers_and_annotations_come_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "answer.jsonl").write_text('{"question_id": 1, "text": "a"}\n{"question_id": 2}\nnonsense\n')
    (tmp_path / "val.json").write_text('{"annotations": [')
    with pytest.raises(DataError) as caught:
        run("vqav2", tmp_path / "answer.jsonl", "--annotations", tmp_path / "val.json", "--allow-missing")
    text = str(caught.value)
    assert "vqav2 cannot be scored" in text and "line 2: it lacks question_id or text" in text
    assert "line 3: " in text and "val.json is damaged" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vqa2"], "there is no benchmark 'vqa2': did you mean 'vqav2'? known: vqav2, okvqa"),
        (["gqa", "--split", "val"], "gqa takes no --split"),
        (["okvqa", "--submission", "s.json"], "okvqa has no file for a test server or a judge"),
        (["mmvet"], "mmvet is scored by a judge model: --submission FILE"),
        (["mmvet", "--per-question", "p.jsonl"], "mmvet has no rule that scores single questions here"),
    ],
)
def test_options_that_do_not_fit_the_benchmark_are_refused(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, *options = words
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SteeringError) as caught:
        run(task, tmp_path / "none.jsonl", "--annotations", tmp_path / "none.json", *options)
    assert message in str(caught.value)


def test_a_failed_answer_is_counted(tmp_path: Path) -> None:
    case = make("okvqa", tmp_path / "official")
    lines = [json.loads(line) for line in case.write_answers(tmp_path / "a.jsonl").read_text().splitlines()]
    lines[0] |= {"text": "", "metadata": {"error": "the logits became NaN"}}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = score("okvqa", tmp_path / "a.jsonl", case.annotations)
    assert found.failed == 1 and "1 answers are empty" in found.notes[0]
    assert found.metrics["other"]["accuracy"] == 0


class TestASubmission:
    def test_of_vqav2s_test_split_holds_every_question_in_the_servers_layout(self, tmp_path: Path) -> None:
        questions = {"questions": [{"question_id": n, "image_id": 1, "question": "What?"} for n in (4, 5)]}
        (tmp_path / "test.json").write_text(json.dumps(questions))
        answers = write_answers(tmp_path / "a.jsonl", [(4, "The Two dogs.", "")])
        given = ("vqav2", answers, "--annotations", tmp_path / "test.json", "--allow-missing")
        with pytest.raises(ArgumentsError, match=r"it is a test split\. Give --submission FILE"):
            run(*given)
        with pytest.raises(ArgumentsError, match="holds no answers, so no question has a score"):
            run(*given, "--submission", tmp_path / "s.json", "--per-question", tmp_path / "p.jsonl")
        done = run(*given, "--submission", tmp_path / "s.json")
        assert "note: a test split: its test server scores the submission" in done.stdout
        written = json.loads((tmp_path / "s.json").read_text())
        assert written == [{"question_id": 4, "answer": "2 dogs"}, {"question_id": 5, "answer": ""}]

    def test_of_textvqas_test_split_has_the_official_ids(self, tmp_path: Path) -> None:
        data = [{"question_id": n, "image_id": "aa", "question": f"What is {n}?"} for n in (8, 9)]
        (tmp_path / "TextVQA_0.5.1_test.json").write_text(json.dumps({"data": data}))
        answers = write_answers(tmp_path / "a.jsonl", [("aa", "Stop.", "What is 9?"), (8, "two", "")])
        annotations = tmp_path / "TextVQA_0.5.1_test.json"
        done = run("textvqa", answers, "--annotations", annotations, "--submission", tmp_path / "s.json")
        assert "its test server scores" in done.stdout
        written = json.loads((tmp_path / "s.json").read_text())
        assert written == [{"question_id": 8, "answer": "2"}, {"question_id": 9, "answer": "stop"}]

    def test_of_vizwiz_and_gqa_is_written_beside_the_scores(self, tmp_path: Path) -> None:
        for task, first in (
            ("vizwiz", {"image": "VizWiz_val_0.jpg", "answer": "unsuitable"}),
            ("gqa", {"questionId": "02", "prediction": "red"}),
        ):
            case = make(task, tmp_path / task)
            answers, file = case.write_answers(tmp_path / "a.jsonl"), tmp_path / f"{task}.json"
            done = run(task, answers, "--annotations", case.annotations, "--submission", file)
            assert json.loads(file.read_text())[0] == first
            assert "accuracy" in done.stdout


def test_popes_answers_to_llavas_question_file_are_found_by_its_categories(tmp_path: Path) -> None:
    folder = pope(tmp_path / "pope")
    asked = [
        {"question_id": 10 * place + n, "text": f"Is there a {split} dog {n}?\nAnswer shortly.", "category": split}
        for place, split in enumerate(("adversarial", "random", "popular"))
        for n in (1, 2)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    answers = write_answers(tmp_path / "a.jsonl", [(each["question_id"], "Yes", "") for each in asked])
    with pytest.raises(DataError, match="need --questions: its ids are others"):
        run("pope", answers, "--annotations", folder)
    found = score("pope", answers, folder, questions=tmp_path / "q.jsonl")
    assert found.metrics["all"]["yes"] == 100 and found.metrics["random"]["accuracy"] == 50
    asked[0]["text"] = "Is there another?"
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    with pytest.raises(DataError, match=r"question 1 asks 'Is there another\?', and adversarial/1 is another"):
        score("pope", answers, folder, questions=tmp_path / "q.jsonl")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text("old")
    with pytest.raises(TypeError):
        write_json(tmp_path / "scores.json", object())
    assert (tmp_path / "scores.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ArgumentsError, match="is a folder"):
        write_json(tmp_path, [])
    with pytest.raises(ArgumentsError, match="cannot be written"):
        write_json(tmp_path / "scores.json" / "below.json", [])
