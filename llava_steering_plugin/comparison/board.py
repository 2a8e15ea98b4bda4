"""Show how far a comparison is: a live table in a terminal, a line for each event elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llava_steering_plugin.comparison.cells import Cell
from llava_steering_plugin.comparison.choosing import Choice
from llava_steering_plugin.comparison.records import DIVERGED, DONE, FAILED, VALIDATION, Record
from llava_steering_plugin.comparison.schedule import Schedule

EVERY_SECONDS = 0.5


@dataclass(frozen=True)
class Running:
    """An evaluation that runs.

    Attributes:
        begun: in seconds of `time.monotonic`.
        step: of how many, where it trains.
    """

    cell: Cell
    split: str
    begun: float
    step: tuple[int, int] | None


class Board:
    """Shows a comparison on a console; without one, nothing."""

    def __init__(self, console: Console | None = None):
        self.console = console
        self._live: Live | None = None
        self._schedule: Schedule | None = None
        self._seconds: dict[str, list[float]] = {}  # by split, of the evaluations that have ended in this run
        self._updated = 0.0
        self._running: Sequence[Running] = ()

    @contextmanager
    def shown(self, schedule: Schedule) -> Iterator[None]:
        """Show the progress of a schedule during the block."""
        self._schedule = schedule
        if schedule.earlier:
            self.say(f"{schedule.earlier} evaluations had ended before")
        if self.console is None or not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, auto_refresh=False, get_renderable=self._table) as self._live:
            try:
                yield
            finally:
                self._live.refresh()
                self._live = None

    def say(self, text: str) -> None:
        """Print a line."""
        if self.console is not None:
            self.console.print(Text(text), soft_wrap=True)

    def update(self, running: Sequence[Running]) -> None:
        """Take what runs at present."""
        self._running = running
        if self._live is not None and time.monotonic() - self._updated > EVERY_SECONDS:
            self._updated = time.monotonic()
            self._live.refresh()

    def ended(self, cell: Cell, record: Record, seconds: float) -> None:
        """Say what has become of an evaluation."""
        self._seconds.setdefault(record.split, []).append(seconds)
        done, total = self._counts()
        scores = ", ".join(f"{name} {score.score:.2f}" for name, score in record.scores.items())
        said = scores if record.status == DONE else record.error
        left = self._left()
        took = _duration(seconds) + (f"; about {_duration(left)} left" if left else "")
        self.say(f"[{done}/{total}] {record.status}: {cell.named()}, {record.split}: {said} ({took})")

    def chosen(self, cell: Cell, choice: Choice) -> None:
        """Say which learning rate was chosen."""
        of = f"{cell.task.name}, {cell.method.name}"
        scores = ", ".join(
            f"{rate:g}: {'-' if score is None else f'{score:.2f}'}" for rate, score in choice.scores.items()
        )
        said = choice.reason if choice.rate is None else f"learning rate {choice.rate:g} is chosen ({scores})"
        self.say(f"{of}: {said}")

    def _counts(self) -> tuple[int, int]:
        """Return how many evaluations have ended and how many there are."""
        assert self._schedule is not None
        return len(self._schedule.records), self._schedule.total()

    def _left(self) -> float | None:
        """Return the seconds that are left, from the mean of what has ended; None before anything has."""
        schedule = self._schedule
        everything = [seconds for own in self._seconds.values() for seconds in own]
        if schedule is None or not everything:
            return None

        def mean(split: str) -> float:
            return statistics.mean(self._seconds.get(split) or everything)

        left = sum(mean(split) for _, split in schedule.waiting) + schedule.to_come() * mean("test")
        for each in self._running:
            if (each.cell.id, each.split) not in schedule.records:
                left += max(0.0, mean(each.split) - (time.monotonic() - each.begun))
        return left / schedule.plan.comparison.processes

    def _table(self) -> Table:
        """Return a row for each method and task, and what runs."""
        schedule = self._schedule
        assert schedule is not None
        done, total = self._counts()
        left = self._left()
        title = f"{done} of {total} evaluations" + (f", about {_duration(left)} left" if left else "")
        table = Table(title=title, title_justify="left")
        for column in ("task", "method"):
            table.add_column(column)
        for column in ("done", "failed", "diverged"):
            table.add_column(column, justify="right")
        table.add_column("running")
        table.add_column("chosen rate", justify="right")
        for names in dict.fromkeys((cell.task.name, cell.method.name) for cell in schedule.plan.cells):
            table.add_row(*map(Text, self._row(schedule, *names)))
        return table

    def _row(self, schedule: Schedule, task: str, method: str) -> list[str]:
        cells = [cell for cell in schedule.plan.cells if (cell.task.name, cell.method.name) == (task, method)]
        statuses = [
            record.status for cell in cells if (record := schedule.records.get((cell.id, VALIDATION))) is not None
        ]
        running = [
            each
            for each in self._running
            if (each.cell.task.name, each.cell.method.name) == (task, method)
            and (each.cell.id, each.split) not in schedule.records
        ]
        choice = schedule.choices.get((task, method))
        rate = "" if choice is None or cells[0].method.frozen else "none" if choice.rate is None else f"{choice.rate:g}"
        return [
            task,
            method,
            f"{statuses.count(DONE)} of {len(cells)}",
            *(str(statuses.count(status) or "") for status in (FAILED, DIVERGED)),
            ", ".join(map(_named, running)),
            rate,
        ]


def _named(running: Running) -> str:
    if running.split != VALIDATION:
        return f"test, seed {running.cell.seed}"
    if running.cell.method.frozen:
        return "answers"
    step = "" if running.step is None else f" {running.step[0]}/{running.step[1]}"
    return f"{running.cell.rate:g}, seed {running.cell.seed}{step}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
