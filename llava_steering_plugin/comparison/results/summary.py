"""Define what a summary of a comparison holds: for each task, what every method has reached and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llava_steering_plugin.comparison.results.statistics import Difference, Spread


@dataclass(frozen=True)
class Outcome:
    """Holds what a method has reached in one test.

    Attributes:
        score: over the seeds that are done; None: none is.
        questions: how many were scored.
        difference: from the reference; None for the reference itself, and where they share no seed.
        by_points: the difference is that of the questions' scores, whose mean the score is not (MME, POPE's F1).
    """

    score: Spread | None
    questions: int
    difference: Difference | None = None
    by_points: bool = False


@dataclass(frozen=True)
class Costs:
    """Holds what a method costs: means over the seeds that are done; None where nothing was measured."""

    trained_parameters: int
    projector_parameters: int
    file_bytes: int
    step_seconds: float | None
    step_ratio: float | None
    answer_seconds: float | None
    answer_ratio: float | None
    peak_bytes: int | None

    @property
    def with_projector(self) -> int:
        """Return all trained parameters."""
        return self.trained_parameters + self.projector_parameters


@dataclass(frozen=True)
class Reached:
    """Holds a method's results for a task, at the learning rate that validation has chosen.

    Attributes:
        frozen: it is the base itself.
        rate: None for the base, and where no cell came to the test.
        seeds: all that were tried at this rate; `done` of them have test scores.
        outcomes: by test.
    """

    method: str
    frozen: bool
    rate: float | None
    seeds: tuple[int, ...]
    done: tuple[int, ...]
    outcomes: Mapping[str, Outcome]
    costs: Costs | None


@dataclass(frozen=True)
class Tried:
    """Holds what a method has reached on the validation split at one learning rate.

    Attributes:
        scores: by test, over the seeds that are done.
        eval_loss: the same of the loss on --eval_data_path; None without that.
    """

    method: str
    rate: float
    chosen: bool
    seeds: int
    done: int
    diverged: int
    failed: int
    scores: Mapping[str, Spread | None]
    eval_loss: Spread | None


@dataclass(frozen=True)
class Ended:
    """Holds a cell that has failed or diverged."""

    task: str
    method: str
    rate: float
    seed: int
    split: str
    status: str
    error: str


@dataclass(frozen=True)
class TaskSummary:
    """Holds a task: its tests with their benchmarks, its methods, and the learning rates that were tried."""

    task: str
    reference: str
    tests: Mapping[str, str]
    methods: tuple[Reached, ...]
    validation_tests: tuple[str, ...]
    tried: tuple[Tried, ...]


@dataclass(frozen=True)
class Summary:
    """Holds a comparison.

    Attributes:
        reference: the method from which the others differ.
        ended: cells that are not done.
        cells: how many there are.
    """

    reference: str
    tasks: tuple[TaskSummary, ...]
    ended: tuple[Ended, ...]
    cells: int
    versions: Mapping[str, tuple[str, ...]]
    commits: tuple[str, ...]
    began: str
    ended_at: str
