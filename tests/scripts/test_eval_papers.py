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
from official_sources import make_source
from quick_runs import SCRIPTS
from steered import load_llava, strengthen
from tiny_llava import TinyLlava
from training_runs import subprocess_environment

from llava_steering_plugin import attach, save_adapter
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.evaluation.layouts.registry import LAYOUTS
from llava_steering_plugin.evaluation.registry import BENCHMARKS
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

    for task, entry in ENTRIES.items():
        assert entry.split in LAYOUTS[task].splits
        assert (BENCHMARKS[task].metrics is None) == (entry.metric is None), task
        assert "http" in where_to_get(task), task
    assert {task for _, columns in TABLES.values() for task in columns} == set(ENTRIES)
    assert all(row.source for row in read_figures(FIGURES))


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
