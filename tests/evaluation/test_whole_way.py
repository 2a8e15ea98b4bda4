"""From an official folder to a score by the three commands: `prepare`, `eval` and `score` agree on ids and prompts.

Covers `evaluation/preparing.py` and `evaluation/scoring.py` together with `cli/evaluate.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from official_sources import make_source
from tiny_llava import TinyLlava
from typer.testing import CliRunner

from llava_steering_plugin.cli import app

# What has ids of its own, ids that two questions share, and ids that are texts.
TASKS = {"gqa": "testdev", "mme": "test", "textvqa": "val", "pope": "test", "mmlu": "test"}


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


@pytest.mark.usefixtures("patched_llava")
def test_the_answers_of_eval_to_a_prepared_benchmark_are_scored(tiny: TinyLlava, tmp_path: Path) -> None:
    data, counts = tmp_path / "data", {}
    for task, split in TASKS.items():
        run("prepare", task, "--source", make_source(task, tmp_path / task), "--output", data, "--split", split)
        counts[task] = len((data / f"{task}_{split}.jsonl").read_text().splitlines())
    asked = "".join((data / f"{task}_{split}.jsonl").read_text() for task, split in TASKS.items())
    (tmp_path / "q.jsonl").write_text(asked)
    files = ("--question-file", tmp_path / "q.jsonl", "--image-folder", data / "images")
    run("eval", tiny.llava, *files, "--answers-file", tmp_path / "a.jsonl", "--device", "cpu", "--max-new-tokens", 3)

    answers = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    assert len(answers) == sum(counts.values())
    for task in TASKS:
        (tmp_path / f"{task}.jsonl").write_text("".join(answers[: counts[task]]))
        answers = answers[counts[task] :]
        output = tmp_path / f"{task}_scores.json"
        run("score", task, tmp_path / f"{task}.jsonl", "--annotations", tmp_path / task, "--output", output)
        found = json.loads(output.read_text())
        assert (found["answers"], found["missing"], found["failed"]) == (counts[task], 0, 0)
        assert found["metrics"]["perception" if task == "mme" else "all"]["questions"] == counts[task]
