"""A comparison is a live table in a terminal, and a line for each event elsewhere."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from compared import content
from rich.console import Console
from tiny_llava import TinyLlava

from llava_steering_plugin.comparison.board import Board, Running
from llava_steering_plugin.comparison.cells import Cell, Plan, plan_cells
from llava_steering_plugin.comparison.reading import comparison_from
from llava_steering_plugin.comparison.records import DIVERGED, DONE, FAILED, TEST, VALIDATION, Record, Score
from llava_steering_plugin.comparison.schedule import Schedule


@pytest.fixture
def plan(tiny: TinyLlava, tmp_path: Path) -> Plan:
    return plan_cells(comparison_from(content(tiny, tmp_path, processes=2), tmp_path))


def record(cell: Cell, split: str = VALIDATION, status: str = DONE, score: float = 50.0) -> Record:
    scores = {"seen": Score("exact_match", score, 8, "a", "b")} if status == DONE else {}
    error = None if status == DONE else f"{status} [red]"
    return Record(
        cell.id, cell.task.name, cell.method.name, {}, cell.rate, cell.seed, split, status, error, scores=scores
    )


def test_elsewhere_every_event_is_a_line_with_the_time_left(plan: Plan, tmp_path: Path) -> None:
    said = io.StringIO()
    board, schedule = Board(Console(file=said, width=200)), Schedule(plan, tmp_path / "output")
    cells = [cell for cell in plan.cells if cell.method.name == "MoReS"]
    with board.shown(schedule):
        for cell in cells:
            status = DIVERGED if cell.rate == 0.01 and cell.seed == 2 else DONE
            schedule.waiting.remove((cell, VALIDATION))
            choice = schedule.ended(cell, record(cell, status=status))
            board.ended(cell, schedule.records[cell.id, VALIDATION], 60)
    assert choice is not None
    board.chosen(cells[0], choice)
    lines = said.getvalue().splitlines()
    # 9 validations and 5 tests; of the other 13, two at a time, each takes a minute.
    assert lines[0] == (
        "[1/14] done: shapes, MoReS, learning rate 0.001, seed 1, validation: seen 50.00 "
        "(1 min 0 s; about 6 min 30 s left)"
    )
    assert "diverged: shapes, MoReS, learning rate 0.01, seed 2, validation: diverged [red]" in lines[3]
    assert lines[-1] == "shapes, MoReS: learning rate 0.001 is chosen (0.001: 50.00, 0.01: -)"


def test_in_a_terminal_a_table_shows_what_is_done_runs_and_failed(plan: Plan, tmp_path: Path) -> None:
    said = io.StringIO()
    console = Console(file=said, width=140, force_terminal=True, color_system=None)
    board, schedule = Board(console), Schedule(plan, tmp_path / "output")
    first, second, third, *_ = [cell for cell in plan.cells if cell.method.name == "MoReS"]
    schedule.ended(first, record(first))
    schedule.ended(second, record(second, status=FAILED))
    with board.shown(schedule):
        board.update([Running(third, VALIDATION, time.monotonic(), (3, 20))])
    *_, last = [line for line in said.getvalue().splitlines() if "MoReS" in line]
    cells = [cell.strip() for cell in last.strip("│ ").split("│")]
    assert cells[:6] == ["shapes", "MoReS", "1 of 4", "1", "", "0.001, seed 2 3/20"]
    assert "2 of 14 evaluations" in said.getvalue()


def test_a_board_without_a_console_says_nothing_and_does_not_fail(plan: Plan, tmp_path: Path) -> None:
    board, schedule = Board(), Schedule(plan, tmp_path / "output")
    with board.shown(schedule):
        board.say("anything")
        board.ended(plan.cells[0], record(plan.cells[0]), 1)


def test_tests_are_to_come_only_for_what_was_chosen(plan: Plan, tmp_path: Path) -> None:
    """`comparison/schedule.py`: no other cell sees test data."""
    schedule = Schedule(plan, tmp_path / "output")
    for cell in plan.cells:
        status = FAILED if cell.method.name == "LoRA" and cell.seed == 2 else DONE
        score = 70.0 if cell.rate == 0.01 else 60.0
        schedule.waiting.remove((cell, VALIDATION))
        schedule.ended(cell, record(cell, status=status, score=score))
    waiting = [(cell.method.name, cell.rate, cell.seed, split) for cell, split in schedule.waiting]
    assert waiting == [("base (frozen)", 0.0, 1, TEST), ("MoReS", 0.01, 1, TEST), ("MoReS", 0.01, 2, TEST)]
    assert schedule.to_come() == 0
    assert schedule.total() == Schedule(plan, tmp_path / "none").total() == len(plan.cells) + 5, "it never changes"
