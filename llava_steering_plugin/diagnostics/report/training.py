"""The section on a training's course, from the log that transformers keeps in trainer_state.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_steering_plugin.diagnostics.report.lines import Line, draw_lines
from llava_steering_plugin.diagnostics.report.parts import (
    Figure,
    Run,
    Section,
    Table,
    number,
    short_names,
    written,
)

LOG = "log_history"
# Keys of the log that are no course: positions, and what the trainer says of a whole pass or training.
NO_COURSE = ("step", "epoch", "total_flos", "train_loss")
MEASURED = "diagnostics/"  # of each layer; diagnostics.jsonl has these in full
NO_COURSE_ENDINGS = ("_runtime", "_per_second")
TITLES = {
    "loss": "Loss",
    "eval_loss": "Validation loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
}


def training_section(runs: Sequence[Run]) -> Section:
    """Return what a report says of trainings: a figure for each logged number, all runs in it.

    Raises:
        KeyError, TypeError, ValueError: a document has another form.
    """
    courses = [_courses(run.document[LOG]) for run in runs]
    keys = list(dict.fromkeys([*TITLES, *(key for course in courses for key in course)]))
    short = short_names([run.label for run in runs])
    figures = []
    for key in keys:
        lines = [
            Line(name, [step for step, _ in course[key]], [value for _, value in course[key]], look=look)
            for look, (name, course) in enumerate(zip(short, courses, strict=True))
            if key in course
        ]
        if lines:
            title = TITLES.get(key, key)
            words = f"{title} by training step, as the trainer logged it."
            figures.append(Figure(title, words, draw_lines(lines, "step", title.lower() if key in TITLES else key)))
    return Section(
        title="Training",
        source="What transformers' Trainer logged (trainer_state.json).",
        findings=[_finding(run.label, course) for run, course in zip(runs, courses, strict=True)],
        limits=["A loss is a mean over the batches since the one before it; losses on other data do not compare."],
        settings=[_settings(runs)],
        figures=figures,
        tables=[_table(run.label, course) for run, course in zip(runs, courses, strict=True)],
    )


def _courses(log: Any) -> dict[str, list[tuple[float, float | None]]]:
    """Return the step and the value of every entry of the log, by what was logged."""
    if not isinstance(log, list):
        raise ValueError(f"{LOG} is no list")
    courses: dict[str, list[tuple[float, float | None]]] = {}
    for entry in log:
        step = number(entry["step"])
        for key, value in entry.items():
            if (
                key in NO_COURSE
                or key.startswith(MEASURED)
                or key.endswith(NO_COURSE_ENDINGS)
                or isinstance(value, str)
            ):
                continue
            if step is not None and not isinstance(value, str):
                courses.setdefault(key, []).append((step, number(value)))
    return courses


def _finding(label: str, courses: Mapping[str, Sequence[tuple[float, float | None]]]) -> str:
    """Say how the losses began and ended."""
    words = []
    for key in ("loss", "eval_loss"):
        points = [(value, step) for step, value in courses.get(key, ()) if value is not None]
        if points:
            (first, begin), (last, end), (lowest, at) = points[0], points[-1], min(points)
            words.append(
                f"The {TITLES[key].lower()} of {label} was {written(first)} at step {begin:.0f} and {written(last)} at "
                f"step {end:.0f}; the lowest was {written(lowest)} at step {at:.0f}."
            )
    return " ".join(words) or f"{label} logged no loss."


def _settings(runs: Sequence[Run]) -> Table:
    wanted = {"global_step": "steps", "epoch": "epochs", "max_steps": "steps planned", "train_batch_size": "batch size"}
    rows = [["file", *(", ".join(run.files) for run in runs)]]
    rows += [[title, *(written(number(run.document.get(key))) for run in runs)] for key, title in wanted.items()]
    return Table("Trainings", ["", *(run.label for run in runs)], rows)


def _table(label: str, courses: Mapping[str, Sequence[tuple[float, float | None]]]) -> Table:
    steps = sorted({step for points in courses.values() for step, _ in points})
    columns = {key: dict(points) for key, points in courses.items()}
    rows = [[f"{step:.0f}", *(written(column.get(step)) for column in columns.values())] for step in steps]
    return Table(f"What {label} logged", ["step", *columns], rows)
