"""Run a comparison: several cells at a time, each to its end, and nothing twice."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from llava_steering_plugin.comparison import commands
from llava_steering_plugin.comparison.board import Board, Running
from llava_steering_plugin.comparison.cells import Cell, Plan, plan_cells
from llava_steering_plugin.comparison.evaluation import evaluate
from llava_steering_plugin.comparison.logs import Progress, summary
from llava_steering_plugin.comparison.output import LOG, begin, locked, output_problems, refuse_another, write_results
from llava_steering_plugin.comparison.preflight import check
from llava_steering_plugin.comparison.processes import Command, Processes
from llava_steering_plugin.comparison.provenance import provenance
from llava_steering_plugin.comparison.records import DONE, FAILED, FILE, TEST, VALIDATION, Record
from llava_steering_plugin.comparison.results.writing import write_results as write_tables
from llava_steering_plugin.comparison.schedule import Schedule
from llava_steering_plugin.comparison.schema import Comparison
from llava_steering_plugin.errors import ArgumentsError, SteeringError

POLL_SECONDS = 0.1
# Trainings with a mode save a checkpoint when they are asked to end.
GRACE_SECONDS = 60.0
FULL_BYTES = 50e6


class Interrupted(SteeringError):
    """Raised when the user has ended a comparison; all programs have ended, and the same command goes on."""


@dataclass(frozen=True)
class Outcome:
    """Holds what a comparison has come to.

    Attributes:
        records: of all evaluations that have ended, as in results.jsonl.
        problems: why the comparison is not whole: cells that failed, methods without a learning rate.
        files: results.jsonl, and the tables and pictures made of it.
    """

    records: list[Record]
    problems: list[str]
    files: list[Path]


@dataclass
class _Job:
    """An evaluation that runs.

    Attributes:
        steps: what is left of it.
        process: the number of its present program.
        slot: of the places for jobs, the one that it has.
        progress: of its training, while it trains.
    """

    cell: Cell
    split: str
    steps: Generator[Command, int, Record]
    slot: int
    begun: float = field(default_factory=time.monotonic)
    process: int = 0
    command: Command | None = None
    progress: Progress | None = None


def compare(comparison: Comparison, board: Board | None = None) -> Outcome:
    """Check a comparison, and run what of it has not been run.

    Args:
        board: shows how far it is; None: nothing is shown.

    Raises:
        ArgumentsError: it cannot start, or the disk is full; what has ended stays, and the same call goes on.
        Interrupted: by SIGINT or SIGTERM.
    """
    board = board or Board()
    plan = plan_cells(comparison)
    if problems := output_problems(comparison.output):
        raise ArgumentsError(". ".join(problems) + ".")
    refuse_another(plan, comparison.output)
    output = comparison.output
    with locked(output, lambda: board.say("waiting for programs of a comparison that was killed")) as lock:
        try:
            log = output / LOG
            with _processes(not comparison.launcher, log, lock) as processes:
                check(plan, board.say)
                left_out = refuse_another(plan, output)
                begin(plan, output)
                if left_out:
                    board.say(f"{len(left_out)} finished cells are not of this comparison any more, and stay unused")
                with _Wishes() as wishes:
                    return _Run(plan, output, processes, board, wishes).run()
        except KeyboardInterrupt:
            raise Interrupted("interrupted before the first training.") from None
        except OSError as error:
            raise ArgumentsError(
                f"{output} cannot be written: {error.strerror}. What has ended is kept; the same command goes on."
            ) from error


def checked_plan(comparison: Comparison, board: Board | None = None) -> Plan:
    """Return the cells of a comparison, after all checks; nothing is written.

    Raises:
        ArgumentsError: it cannot start.
    """
    plan = plan_cells(comparison)
    if problems := output_problems(comparison.output):
        raise ArgumentsError(". ".join(problems) + ".")
    refuse_another(plan, comparison.output)
    check(plan, (board or Board()).say)
    return plan


@contextmanager
def _processes(preload: bool, log: Path, lock: int) -> Iterator[Processes]:
    processes = Processes(preload, log, [lock])
    try:
        yield processes
    finally:
        processes.close()


class _Wishes:
    """Counts how often the user has asked for the end, by Ctrl-C or SIGTERM, during the block.

    An exception, as Python raises it for Ctrl-C, might come between a request to the supervisor and its answer.
    """

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> _Wishes:
        # Python lets the main thread alone do this; a comparison in another one is ended by its caller.
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


class _Run:
    def __init__(self, plan: Plan, output: Path, processes: Processes, board: Board, wishes: _Wishes):
        self.plan, self.output, self.processes, self.board, self.wishes = plan, output, processes, board, wishes
        self.schedule = Schedule(plan, output)
        self.jobs: list[_Job] = []
        self.gpus = _gpus(plan.comparison)
        self.provenance = provenance()

    def run(self) -> Outcome:
        self._write()
        with self.board.shown(self.schedule):
            while self.schedule.waiting or self.jobs:
                while self.schedule.waiting and len(self.jobs) < self.plan.comparison.processes:
                    self._begin()
                self._look()
                self.board.update([_running(job) for job in self.jobs])
                time.sleep(POLL_SECONDS)
                if self.wishes.count:
                    self._stop()
                    raise Interrupted(
                        "interrupted; all trainings have ended. The same command goes on where this one ended."
                    )
        records = self._write()
        return Outcome(records, self._problems(), [self.output / FILE, *self._tables(records)])

    def _tables(self, records: list[Record]) -> list[Path]:
        """Write tables and pictures; without them the results are still there."""
        if not any(record.status == DONE for record in records):
            return []
        try:
            return write_tables(self.output, reference=self.plan.comparison.reference)
        except ArgumentsError as error:
            self.board.say(f"note: {error}")
            return []

    def _begin(self) -> None:
        cell, split = self.schedule.waiting.popleft()
        slot = min(set(range(self.plan.comparison.processes)) - {job.slot for job in self.jobs})
        env = {"CUDA_VISIBLE_DEVICES": str(self.gpus[slot % len(self.gpus)])} if self.gpus else {}
        if split == TEST and (others := self.schedule.tested_before(cell)):
            self.board.say(
                f"note: test data of {cell.task.name} was answered before at learning rate "
                f"{', '.join(sorted({f'{other.rate:g}' for other in others}))} of {cell.method.name}: the file was "
                "edited since, and the test has been looked at more than once"
            )
        steps = evaluate(cell, self.plan, split, self.output, self.provenance, env)
        job = _Job(cell, split, steps, slot)
        self.jobs.append(job)
        self._advance(job, None)

    def _advance(self, job: _Job, status: int | None) -> None:
        """Start the next program of a job, or take its record."""
        try:
            job.command = next(job.steps) if status is None else job.steps.send(status)
        except StopIteration as ended:
            self.jobs.remove(job)
            self._ended(job, ended.value)
            return
        job.process = self.processes.start(job.command)
        job.progress = Progress(job.command.log) if job.command.log.name == commands.TRAIN_LOG else None

    def _look(self) -> None:
        for job in list(self.jobs):
            status = self.processes.poll(job.process)
            if status is not None:
                self._advance(job, status)

    def _ended(self, job: _Job, record: Record) -> None:
        choice = self.schedule.ended(job.cell, record)
        self._write()
        self.board.ended(job.cell, record, time.monotonic() - job.begun)
        if choice is not None and not job.cell.method.frozen:
            self.board.chosen(job.cell, choice)
        if record.status == FAILED and shutil.disk_usage(self.output).free < FULL_BYTES:
            self._stop()
            raise ArgumentsError(
                f"the disk of {self.output} is full, so {job.cell.named()} failed and the comparison ends. Free some "
                f"space; the same command goes on.\n{record.error}"
            )

    def _stop(self) -> None:
        """End all programs: with time to save at first, and at once if the user asks again."""
        self.board.say("ending all trainings; once more to end them at once")
        for job in self.jobs:
            self.processes.signal(job.process, signal.SIGTERM)
        end, before, running = time.monotonic() + GRACE_SECONDS, self.wishes.count, list(self.jobs)
        while running and time.monotonic() < end and self.wishes.count == before:
            time.sleep(POLL_SECONDS)
            running = [job for job in running if self.processes.poll(job.process) is None]
        for job in running:
            self.processes.signal(job.process, signal.SIGKILL)

    def _write(self) -> list[Record]:
        failed = [record for record in self.schedule.records.values() if record.status == FAILED]
        return write_results(self.plan, self.output, failed, self.schedule.tested)

    def _problems(self) -> list[str]:
        failed = [
            f"{cell.named()}: {summary(record.error or '')}"
            for cell in self.plan.cells
            for split in (VALIDATION, TEST)
            if (record := self.schedule.records.get((cell.id, split))) is not None and record.status == FAILED
        ]
        return failed + [
            f"{task}, {method}: no learning rate was chosen, so it was not tested: {choice.reason}"
            for (task, method), choice in self.schedule.choices.items()
            if choice.rate is None
        ]


def _running(job: _Job) -> Running:
    return Running(job.cell, job.split, job.begun, None if job.progress is None else job.progress.now())


def _gpus(comparison: Comparison) -> tuple[Any, ...]:
    """Return the GPUs that processes get one each of; none where a launcher gives them out, or there is only one."""
    if comparison.gpus or comparison.launcher:
        return comparison.gpus
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(visible.split(",")) if visible else tuple(range(count))
