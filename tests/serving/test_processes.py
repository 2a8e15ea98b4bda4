"""Programs are started, watched and stopped together. All three of the server: test_launcher.py."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.serving.processes import Program, ProgramDied, Programs

PATIENCE = 480  # for a machine with much else to do


def test_a_part_that_does_not_answer_is_said_with_the_place_that_tells_why(tmp_path: Path) -> None:
    with Programs(Console(file=io.StringIO()), tmp_path, tmp_path) as parts:
        part = Program("page", ["-c", "import time; time.sleep(60)"], lambda: False)
        parts.start(part)
        with pytest.raises(SteeringError, match=r"the page .* 0\.1 seconds after.* output above"):
            parts.wait(part, 0.1, lambda: False)


def test_lines_that_come_every_few_seconds_are_not_shown_and_all_others_are(tmp_path: Path) -> None:
    said = io.StringIO()
    program = "print('Receive heart beat. http://here'); print('register a new worker [http://here]')"
    with Programs(Console(file=said, width=200), tmp_path, tmp_path) as parts:
        parts.start(Program("controller", ["-c", program], lambda: False, hidden="Receive heart beat"))
        with pytest.raises(ProgramDied, match="register a new worker"):
            parts.wait(Program("controller", [], lambda: False), PATIENCE, lambda: False)
    assert "controller | register a new worker [http://here]" in said.getvalue()
    assert "heart beat" not in said.getvalue()
