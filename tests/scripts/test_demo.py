"""The demo: its data is what it says, finished stages are used again, and the quick run goes through every part."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console


def test_the_shifted_camera_moves_red_to_green_green_to_blue_and_blue_to_red() -> None:
    from experiments import world

    pixels = np.array([[[200, 20, 10], [10, 200, 20], [10, 20, 200], [90, 90, 90]]], dtype=np.uint8)
    seen = np.asarray(world.permuted(Image.fromarray(pixels)))
    assert seen[0].argmax(1).tolist()[:3] == [1, 2, 0]
    assert seen[0, 3].tolist() == [90, 90, 90]


def test_the_sample_has_a_third_of_each_kind_and_one_question_of_a_kind_per_picture() -> None:
    from experiments import world

    questions = world.Split.load("test").questions
    sample = world.test_sample(questions, 90)
    assert Counter(question.kind for question in sample) == {"colour": 30, "shape": 30, "yes/no": 30}
    assert len({(question.kind, question.image) for question in sample}) == 90
    assert sample == world.test_sample(questions, 90)
    assert sample != world.test_sample(questions, 90, seed=8)


def test_what_is_seen_in_a_picture_comes_from_answers_and_questions() -> None:
    from experiments import world

    asked = [
        world.Question(0, "what color is the triangle?", "red"),
        world.Question(1, "what is the blue shape?", "circle"),
        world.Question(2, "is there a circle?", "yes"),
    ]
    assert world.seen_in(asked) == {0: ("red", "triangle"), 1: ("blue", "circle"), 2: (None, None)}


def test_conversations_hold_every_question_once_three_about_one_picture_and_the_picture_first() -> None:
    from experiments import world

    questions = world.Split.load("test").questions[:200]
    made = world.conversations(questions)
    turns = [sample["conversations"] for sample in made]
    assert all(len(each) in (2, 4, 6) for each in turns)
    asked = [turn["value"].removeprefix("<image>\n") for each in turns for turn in each[::2]]
    assert Counter(asked) == Counter(question.text for question in questions)
    assert all("<image>" in each[0]["value"] for each in turns)
    assert not [turn for each in turns for turn in each[1:] if "<image>" in turn["value"]]


def test_a_finished_stage_runs_again_only_if_something_it_depends_on_changed(tmp_path: Path) -> None:
    from experiments import stages

    ran: list[str] = []

    def stage(name: str, settings: dict[str, Any], *needs: stages.Done) -> stages.Done:
        def work(context: stages.Context) -> dict[str, Any]:
            ran.append(name)
            (context.folder / "made").write_text(name)
            return {"made": name}

        return stages.Runner(tmp_path, Console(quiet=True)).run(stages.Stage(name, settings, needs, work))

    def both(steps: int) -> stages.Done:
        return stage("second", {}, stage("first", {"steps": steps}))

    assert both(1).values == both(1).values == {"made": "second"}
    assert ran == ["first", "second"]
    both(2)
    assert ran == ["first", "second"] * 2
    (tmp_path / "second" / "stage.json").unlink()
    both(2)
    assert ran == [*["first", "second"] * 2, "second"]


def test_a_failing_command_shows_the_end_of_its_log_and_is_not_taken_for_done(tmp_path: Path) -> None:
    from experiments import stages

    command = [sys.executable, "-c", "import sys; sys.exit('the disk is on fire')"]
    runner = stages.Runner(tmp_path, Console(quiet=True))
    with pytest.raises(stages.StageError, match="the disk is on fire") as failed:
        runner.run(stages.Stage("broken", {}, (), lambda context: context.run(command) and {}))
    assert str(tmp_path / "broken" / "log.txt") in str(failed.value)
    assert not (tmp_path / "broken" / "stage.json").exists()


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


def test_the_table_and_the_plot_show_every_row(tmp_path: Path) -> None:
    from experiments.demo import report

    kinds = {"all": 0.5, "colour": 0.25, "shape": 0.5, "yes/no": 0.75}
    rows = [
        {"model": name, "camera": camera, "parameters": parameters, "train_seconds": parameters, **kinds}
        for name, camera, parameters in (
            ("base", "clean", None),
            ("base", "shifted", None),
            ("MoReS rank 4, all", "shifted", 4112),
            ("LoRA r=8", "shifted", 81920),
        )
    ]
    results = {"questions": 30, "rows": rows}
    console = Console(width=160, record=True, quiet=False, file=(tmp_path / "shown").open("w"))
    console.print(report.table(results))
    shown = console.export_text()
    assert "4,112" in shown
    assert "81,920" in shown
    report.plot(results, tmp_path / "plot.png")
    assert min(Image.open(tmp_path / "plot.png").size) > 400
