"""Stages run once, and again when something that they depend on has changed (`experiments.stages`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console


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
