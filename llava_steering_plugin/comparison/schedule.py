"""Decide what runs next: validation of all cells, then the test of those whose learning rate was chosen."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pathlib import Path

from llava_steering_plugin.comparison.cells import Cell, Plan
from llava_steering_plugin.comparison.choosing import Choice, choose
from llava_steering_plugin.comparison.evaluation import find_record
from llava_steering_plugin.comparison.records import DONE, TEST, VALIDATION, Record

Evaluation = tuple[Cell, str]


class Schedule:
    """Holds what has ended, and what is to run.

    Args:
        output: where results of earlier runs are.

    Attributes:
        records: of the evaluations that have ended, in this run or before.
        choices: by the names of task and method.
        earlier: how many evaluations had ended before this run.
    """

    def __init__(self, plan: Plan, output: Path):
        self.plan, self.output = plan, output
        self.records: dict[tuple[str, str], Record] = {}
        self.choices: dict[tuple[str, str], Choice] = {}
        self.waiting: deque[Evaluation] = deque()
        self._add((cell, VALIDATION) for cell in plan.cells)
        for cell in plan.cells:
            self._choose(cell)
        self.earlier = len(self.records)

    def ended(self, cell: Cell, record: Record) -> Choice | None:
        """Take the record of an evaluation that has ended; return the choice that it makes possible, if any."""
        self.records[cell.id, record.split] = record
        return self._choose(cell) if record.split == VALIDATION else None

    @property
    def tested(self) -> set[str]:
        """Return the ids of cells that are tested, or will be."""
        return {
            cell.id
            for cell in self.plan.cells
            if (choice := self.choices.get((cell.task.name, cell.method.name))) is not None and choice.rate == cell.rate
        }

    def to_come(self) -> int:
        """Return how many tests are not in the queue yet, because no learning rate has been chosen."""
        undecided = {
            (cell.task.name, cell.method.name): 1 if cell.method.frozen else len(self.plan.comparison.seeds)
            for cell in self.plan.cells
            if (cell.task.name, cell.method.name) not in self.choices
        }
        return sum(undecided.values())

    def total(self) -> int:
        """Return how many evaluations there are if a learning rate can be chosen for every method."""
        tests = {
            (cell.task.name, cell.method.name): 1 if cell.method.frozen else len(self.plan.comparison.seeds)
            for cell in self.plan.cells
        }
        return len(self.plan.cells) + sum(tests.values())

    def tested_before(self, cell: Cell) -> list[Cell]:
        """Return cells of the same method and task, at other learning rates, that test data was looked at with."""
        return [
            other
            for other in self.plan.of(cell.task, cell.method)
            if other.rate != cell.rate and find_record(other, self.plan, TEST, self.output) is not None
        ]

    def _add(self, evaluations: Iterable[Evaluation]) -> None:
        for cell, split in evaluations:
            if (record := find_record(cell, self.plan, split, self.output)) is not None:
                self.records[cell.id, split] = record
            else:
                self.waiting.append((cell, split))

    def _choose(self, cell: Cell) -> Choice | None:
        """Choose the learning rate of a cell's method, once all of its cells have ended."""
        names = cell.task.name, cell.method.name
        cells = self.plan.of(cell.task, cell.method)
        records = [record for each in cells if (record := self.records.get((each.id, VALIDATION))) is not None]
        if names in self.choices or len(records) < len(cells):
            return None
        if cell.method.frozen:
            done = records[0].status == DONE
            choice = Choice(0.0 if done else None, {}, None if done else "it cannot answer")
        else:
            choice = choose(records, cell.method.rates, self.plan.comparison.seeds)
        self.choices[names] = choice
        self._add((each, TEST) for each in cells if each.rate == choice.rate)
        return choice
