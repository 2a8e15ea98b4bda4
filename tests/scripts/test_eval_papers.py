"""scripts/eval_papers.sh: small benchmarks in their official layout, from the folder to the papers' tables.

Covers the package `papers`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from official_sources import make_source, write_lines
from quick_runs import SCRIPTS
from steered import load_llava, strengthen
from tiny_llava import TinyLlava
from training_runs import subprocess_environment

from llava_steering_plugin import attach, save_adapter
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.evaluation.layouts.registry import LAYOUTS, layout_of
from llava_steering_plugin.evaluation.preparing import prepare
from llava_steering_plugin.evaluation.registry import BENCHMARKS
from llava_steering_plugin.evaluation.scoring import score
from llava_steering_plugin.modes.mores import MoReS

TASKS = ("gqa", "mme", "mmvet")  # a plain one, one whose number is no accuracy, and one that a judge scores


def evaluate(llava: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run the script with the Python of these tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = subprocess_environment(llava, {"PATH": path, "COLUMNS": "200", "VIRTUAL_ENV": sys.prefix})
    command = [str(SCRIPTS / "eval_papers.sh"), *map(str, words)]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=400)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("papers")
    for task in TASKS:
        make_source(task, folder / task)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_llava(tiny.llava)
    strengthen(attach(model, MoReS(tokens="all", rank=2)))
    folder = tmp_path_factory.mktemp("adapters") / "pets"
    save_adapter(model, folder)
    return folder


@pytest.mark.slow
def test_what_is_there_is_run_once_and_the_rest_says_where_to_get_it(
    tiny: TinyLlava, patched_llava: Path, data: Path, adapter: Path, tmp_path: Path
) -> None:
    words = (tiny.llava, "--data", data, "--output", tmp_path, "--adapter", f"pets={adapter}", "--device", "cpu")
    only = ("--only", ",".join((*TASKS, "vqav2")))

    dry = evaluate(patched_llava, *words, *only, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.count("to run") == len(TASKS) and dry.stdout.count("not there") == 1
    assert dry.stdout.count(" eval ") == len(TASKS) and f"pets={adapter}" in dry.stdout
    assert not list(tmp_path.iterdir())

    done = evaluate(patched_llava, *words, *only)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "report.md").read_text()
    assert page in done.stdout
    rows = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| ")}
    assert (
        "| 78.5 | 62 | 50 | 66.8 | 58.2 | 85.9 | 1510.7 | 31.1 |" in rows["LLaVA-1.5 7B, all weights tuned (published)"]
    )
    report = json.loads((tmp_path / "report.json").read_text())
    for model in ("__base__", "pets"):
        scores = report["scores"]["gqa"][model]
        assert (scores["answers"], scores["missing"]) == (3, 0)
    assert f"VQAv2 (`vqav2`): no {data / 'vqav2'}. Get it from visualqa.org" in page
    answers = [(tmp_path / "answers" / f"gqa-{model}.jsonl").read_text() for model in ("__base__", "pets")]
    assert answers[0] != answers[1], "the adapter's answers are its own"
    assert (tmp_path / "answers" / "mmvet-pets-submission.json").is_file()

    results = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "results").iterdir()}
    (tmp_path / "results" / "mme.json").unlink()
    again = evaluate(patched_llava, *words, *only)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("done before") == len(TASKS) - 1
    assert (tmp_path / "report.md").read_text() == page
    for name, written in results.items():
        assert ((tmp_path / "results" / name).stat().st_mtime_ns == written) == (name != "mme.json")


@pytest.mark.slow
def test_a_benchmark_that_fails_is_named_and_the_others_go_on(
    tiny: TinyLlava, patched_llava: Path, data: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "data"
    make_source("gqa", broken / "gqa")
    (broken / "mmvet").mkdir()
    words = (tiny.llava, "--data", broken, "--output", tmp_path / "out", "--device", "cpu", "--samples", 2)
    done = evaluate(patched_llava, *words, "--only", "mmvet,gqa")
    assert done.returncode == 1, done.stderr[-3000:]
    assert "mmvet failed: " in done.stdout and "mm-vet.json" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["scores"]["gqa"]["__base__"]["answers"] == 2
    assert report["not_run"]["mmvet"].startswith("failed: ")
    assert "(2 of 3)" in (tmp_path / "out" / "report.md").read_text()


def test_everything_wrong_with_the_arguments_is_said_at_once(patched_llava: Path, tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text('{"rows": [{"table": "x", "model": "M", "values": {"y": 1}, "source": ""}]}')
    (tmp_path / "base").mkdir()
    done = evaluate(
        patched_llava, tmp_path / "base", "--data", tmp_path / "nothing", "--output", tmp_path / "out",
        "--adapter", tmp_path / "no-adapter", "--only", "gqa,vqa2", "--figures", tmp_path / "figures.json",
        "--load-4bit", "--load-8bit",
    )  # fmt: skip
    assert done.returncode == 2 and not done.stdout
    for text in (
        "no benchmark 'vqa2' did you mean 'vqav2'?",
        f"--data {tmp_path / 'nothing'} is no folder",
        f"{tmp_path / 'base'}",
        f"{tmp_path / 'no-adapter'}",
        "no table 'x'",
        "no benchmark 'y'",
        "it names no source",
    ):
        assert text in done.stderr, done.stderr
    assert done.stderr.count("\n  - ") >= 5


def test_every_benchmark_of_the_tables_can_be_prepared_scored_and_found() -> None:
    from papers.tables import ENTRIES, FIGURES, TABLES, read_figures, where_to_get

    assert not any("-" in task for task in ENTRIES), "the answers of one model are in TASK-MODEL.jsonl"
    for task, entry in ENTRIES.items():
        assert entry.split in LAYOUTS[task].splits
        assert (BENCHMARKS[task].metrics is None) == (entry.metric is None), task
        assert "http" in where_to_get(task), task
    assert {task for _, columns in TABLES.values() for task in columns} == set(ENTRIES)
    assert all(row.source and row.checked for row in read_figures(FIGURES))


def request_of(output: Path, **adapters: str) -> Any:
    from papers.runs import Request

    return Request("a/base", adapters, output, output, None, 0, {"batch-size": "8"})


def test_no_name_of_an_adapter_makes_two_files_one(tmp_path: Path) -> None:
    from papers.runs import answers_file, questions_file
    from papers.tables import ENTRIES

    request = request_of(tmp_path, questions="a/q", answers="a/a", gqa="a/g")
    files = [file(request, task) for task in ENTRIES for file in (questions_file, answers_file)]
    files += [answers_file(request, task, model) for task in ENTRIES for model in request.models]
    assert len(set(files)) == len(files)


@pytest.mark.parametrize("written", ["[]", "{}", "{", '{"key": {}, "scores": {}}'])
def test_results_that_are_damaged_or_of_another_request_are_none(written: str, tmp_path: Path) -> None:
    from papers.runs import finished, results_file

    request = request_of(tmp_path)
    results_file(request, "gqa").parent.mkdir()
    results_file(request, "gqa").write_text(written)
    assert finished(request, "gqa") is None


def test_results_are_those_of_the_files_that_a_model_had_when_its_evaluation_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that is trained on while it answers is evaluated again."""
    from papers import runs

    (tmp_path / "pets").mkdir()
    weights = tmp_path / "pets" / "adapter_model.safetensors"
    weights.write_bytes(b"one")
    request = request_of(tmp_path, pets=str(tmp_path / "pets"))
    make_source("gqa", tmp_path / "gqa")

    def answer(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked = (json.loads(line) for line in runs.questions_file(request, "gqa").read_text().splitlines())
        answers = [{"question_id": each["question_id"], "prompt": each["text"], "text": "yes"} for each in asked]
        write_lines(runs.answers_file(request, "gqa"), answers)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", answer)
    assert runs.run_task(request, "gqa")["pets"]["answers"] == 3
    assert runs.finished(request, "gqa") is not None
    weights.write_bytes(b"three")
    assert runs.finished(request, "gqa") is None

    def trained_meanwhile(command: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
        weights.write_bytes(b"a fourth")
        return answer(command, **given)

    monkeypatch.setattr(subprocess, "run", trained_meanwhile)
    runs.run_task(request, "gqa")
    assert runs.finished(request, "gqa") is None


def test_each_column_is_a_number_that_score_gives_for_the_split_that_is_prepared(tmp_path: Path) -> None:
    from papers.tables import ENTRIES, value_of

    for task, entry in ENTRIES.items():
        if entry.metric is None or task == "flickr30k":  # a judge's; Java's
            continue
        source = make_source(task, tmp_path / task / "source")
        made = prepare(task, source, tmp_path / task / "data", split=layout_of(task, entry.split)[1])
        lines = [json.loads(line) for line in made.questions.read_text().splitlines()]
        answers = [{"question_id": line["question_id"], "prompt": line["text"], "text": "yes"} for line in lines]
        write_lines(tmp_path / "answers.jsonl", answers)
        scores = score(task, tmp_path / "answers.jsonl", source).as_json()
        assert value_of(task, scores) is not None, task


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"values": {"gqa": "62.0"}}, "M: gqa is '62.0', which is no number"),
        ({"values": {"gqa": True}}, "M: gqa is True, which is no number"),
        ({"values": ["gqa"]}, "M: its values are no numbers by benchmark"),
        ({"table": ["llava"]}, r"M: no table \['llava'\]"),
        ({"model": 3}, "the model 3 is no name"),
        ({"checked": True}, "M: checked is True, which is no text"),
    ],
)
def test_published_rows_are_checked_before_anything_runs(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    from papers.tables import read_figures

    right = {"table": "llava", "model": "M", "values": {"gqa": 62.0}, "source": "a paper"}
    (tmp_path / "mine.json").write_text(json.dumps({"rows": [right | row]}))
    with pytest.raises(ArgumentsError, match=said):
        read_figures(tmp_path / "mine.json")


@pytest.mark.parametrize("content", ["", "[]", '{"rows": [{"table": "llava"}]}', '{"rows": 3}'])
def test_a_file_that_holds_no_figures_is_refused(content: str, tmp_path: Path) -> None:
    from papers.tables import read_figures

    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(ArgumentsError, match=r"mine\.json has no published figures"):
        read_figures(tmp_path / "mine.json")


def test_a_number_that_is_undefined_and_a_table_without_published_rows_say_so() -> None:
    from papers.report import markdown

    scores: dict[str, dict[str, Any]] = {
        "pope": {"mine": {"metrics": {"all": {"mean f1": None}}, "answers": 3, "missing": 0}}
    }
    page = markdown(["hallucination"], ["mine"], scores, [], {})
    assert "| mine | undefined | not run |" in page
    assert "are not in figures.json: give them by `--figures`" in page


def test_the_page_says_what_published_figures_were_checked_with() -> None:
    from papers.report import markdown
    from papers.tables import Published

    rows = [
        Published("text", "A", {"mmlu": 55.3}, "a paper, Table 4", "with its text"),
        Published("text", "B", {"mmlu": 57.0}, "a slide"),
    ]
    page = markdown(["text"], ["mine"], {}, rows, {})
    assert "- A: a paper, Table 4 (checked with its text)\n- B: a slide (not checked)" in page
