"""The measurement of starts: ratios within a round, and what it judges by them."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_processor_time_is_that_of_the_program_alone_and_a_wait_is_wall_clock_only() -> None:
    from benchmarks.startup import started

    waiting = started(["-S", "-c", "import time; time.sleep(0.5)"])
    busy = started(["-S", "-c", "import time\nwhile time.process_time() < 0.5: pass"])

    assert waiting.wall > 0.5 and waiting.processor < 0.4
    assert busy.processor > 0.45


def test_a_program_that_fails_is_no_measurement() -> None:
    from benchmarks.startup import started

    with pytest.raises(RuntimeError, match="ended with 3"):
        started(["-c", "import sys; sys.exit(3)"])


def test_programs_are_compared_within_each_round() -> None:
    from benchmarks.startup import PLAN, REFERENCE, Start, judged, ratio

    # The machine is ten times slower in the second round.
    starts = {
        REFERENCE: [Start(1, 1), Start(10, 10), Start(1, 1)],
        PLAN: [Start(1.1, 1.1), Start(11, 11), Start(9, 9)],
        "plan --help": [Start(0.3, 0.4), Start(3, 4), Start(0.3, 2)],
    }

    assert ratio(starts, PLAN) == pytest.approx(1.1)
    assert [(round(verdict.measured, 1), verdict.passed) for verdict in judged(starts)] == [(1.1, True), (0.4, True)]


def test_every_command_and_every_module_with_a_help_is_started(tmp_path: Path) -> None:
    from benchmarks.startup import COMMANDS, MODULES, programs
    from llava_steering_plugin.cli import app

    assert {command.name or command.callback.__name__ for command in app.registered_commands} == {*COMMANDS} - {""}
    assert len(programs(tmp_path)) == 3 + len(COMMANDS) + len(MODULES)
