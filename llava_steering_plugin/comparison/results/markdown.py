"""Write a summary as Markdown: the tables of results.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llava_steering_plugin.comparison.results.outcomes import MEAN
from llava_steering_plugin.comparison.results.statistics import RESAMPLES, Difference, Spread
from llava_steering_plugin.comparison.results.summary import Ended, Outcome, Reached, Summary, TaskSummary, Tried

NONE = "\N{EN DASH}"  # stands where there is no number
MINUS = "\N{MINUS SIGN}"
LONGEST_REASON = 200  # characters of why a cell has ended; results.jsonl has the whole

HOW_TO_READ = f"""\
## How to read this

- A score is the mean over seeds, as `llava-steering score` gives it (in percent, but for sums such
  as MME's), ± the standard deviation over seeds. There is no deviation of a single seed.
- A difference is in percentage points, over the seeds and questions that both methods have: the
  same question, at the same seed, with the same order of samples. In brackets is its 95 % interval
  by the bootstrap: {RESAMPLES:,} times, seeds and questions are drawn with replacement, and all drawn
  seeds answer the drawn questions. With one seed only questions are drawn: such an interval says
  nothing of what another seed would give. Of two or three seeds it is too narrow. In a mean of
  tests, each test counts as much as another, and questions are drawn within each.
- An interval that holds 0 does not show that two methods are equal.
- Every method chose its learning rate from the same number of rates on the validation split, by
  the mean over seeds and tests. A rate at which a seed has diverged is not chosen, and a method of
  which a training failed is not tested before it is done. The test data were looked at for the
  chosen rate alone.
- A training step is the median time of a step, over that of a forward pass of the frozen model; an
  answer is the time for a question, over the frozen model's. Times are of this machine in this run.
- The file is all that is loaded beside the base.
"""


def markdown(summary: Summary, picture: str | None = None) -> str:
    """Return results.md.

    Args:
        picture: the file of the plot, beside this one; None: there is none.
    """
    parts = ["# Comparison", _about(summary)]
    if summary.ended:
        parts.append(
            f"**{len(summary.ended)} of {summary.cells} cells have no result**: "
            "[which, and why](#cells-without-a-result)."
        )
    if picture is not None:
        parts.append(f"![Scores against trained parameters]({picture})")
    for task in summary.tasks:
        parts += _task(task)
    if summary.ended:
        parts += ["## Cells without a result", _ended(summary.ended)]
    return "\n\n".join(parts) + "\n\n" + HOW_TO_READ


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a table; all columns but the first `left` are aligned to the right."""
    lines = [head, [*["---"] * left, *["---:"] * (len(head) - left)], *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _about(summary: Summary) -> str:
    versions = ", ".join(f"{package} {' and '.join(found)}" for package, found in summary.versions.items())
    facts = [
        f"{summary.cells} cells: trainings, and the frozen model for each task",
        f"from {summary.began} to {summary.ended_at}" if summary.began and summary.ended_at else "",
        f"commit {' and '.join(summary.commits)}" if summary.commits else "",
        versions,
    ]
    return "; ".join(filter(None, facts)) + "."


def _task(task: TaskSummary) -> list[str]:
    head = ["method", "learning rate", "seeds"]
    for test in task.tests:
        head += [test, f"{MINUS} {task.reference}"]
    rows = [
        [
            one.method,
            _rate(one.rate),
            seeds_of(one),
            *(cell for test in task.tests for cell in _scores(task, one, test)),
        ]
        for one in task.methods
    ]
    asked = ", ".join(
        f"{test} ({benchmark}, {max(one.outcomes[test].questions for one in task.methods):,} questions)"
        for test, benchmark in task.tests.items()
        if test != MEAN
    )
    parts = [
        f"## {_cell(task.task)}",
        f"Tests: {asked}." if asked else "No cell has come to the test.",
        table(head, rows),
    ]
    if notes := _notes(task):
        parts.append("\n".join(notes))
    return [*parts, _costs(task), "Validation, by learning rate; the chosen ones are bold:", *_validation(task)]


def _scores(task: TaskSummary, one: Reached, test: str) -> tuple[str, str]:
    outcome = one.outcomes[test]
    if one.method == task.reference:
        return spread(outcome.score), "reference"
    return spread(outcome.score), difference(outcome) + ("*" if outcome.by_points and outcome.difference else "")


def _notes(task: TaskSummary) -> list[str]:
    """Return what must be said of single numbers."""
    notes = []
    outcomes = [(one.method, test, one.outcomes[test]) for one in task.methods for test in task.tests]
    if any(outcome.by_points for _, _, outcome in outcomes):
        notes.append("- \\* of the share of right answers, of which this score is no mean.")
    for method, test, outcome in outcomes:
        paired = outcome.difference
        if paired is not None and 0 < paired.questions < outcome.questions:
            notes.append(
                f"- {_cell(method)}, {_cell(test)}: {paired.questions:,} of {outcome.questions:,} questions are paired."
            )
    return notes


def seeds_of(one: Reached) -> str:
    """Return how many seeds are done, and of how many."""
    if one.frozen:
        return NONE if one.done else "failed"
    return str(len(one.done)) if len(one.done) == len(one.seeds) else f"{len(one.done)} of {len(one.seeds)}"


def spread(value: Spread | None, digits: int = 1) -> str:
    """Return a mean and its deviation."""
    if value is None:
        return NONE
    return f"{value.mean:.{digits}f}" + ("" if value.deviation is None else f" ± {value.deviation:.{digits}f}")


def difference(outcome: Outcome) -> str:
    """Return a difference with its interval."""
    found = outcome.difference
    return NONE if found is None else _signed(found.mean) + _interval(found)


def _interval(found: Difference) -> str:
    return "" if found.low is None or found.high is None else f" [{_signed(found.low)}, {_signed(found.high)}]"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", MINUS).replace(f"{MINUS}0.0", "0.0").replace("+0.0", "0.0")


def _rate(rate: float | None) -> str:
    return NONE if rate is None else f"{rate:g}"


def _costs(task: TaskSummary) -> str:
    head = ["method", "trained parameters", "with projector", "file", "training step", "answer", "peak memory"]
    rows = []
    for one in task.methods:
        costs = one.costs
        if costs is None:
            rows.append([one.method, *[NONE] * 6])
            continue
        rows.append(
            [
                one.method,
                f"{costs.trained_parameters:,}",
                f"{costs.with_projector:,}",
                byte_count(costs.file_bytes),
                _ratio(costs.step_ratio, costs.step_seconds),
                _ratio(costs.answer_ratio, costs.answer_seconds),
                byte_count(costs.peak_bytes),
            ]
        )
    return table(head, rows)


def _ratio(ratio: float | None, seconds: float | None) -> str:
    if seconds is None:
        return NONE
    return (NONE if ratio is None else f"{ratio:.2f} x") + f" ({seconds:.3g} s)"


def byte_count(count: int | None) -> str:
    """Return a number of bytes in the largest unit that gives at least 1."""
    if not count:
        return NONE
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"


def _validation(task: TaskSummary) -> list[str]:
    """Return a table for each validation test, and one of the loss if it was measured."""
    rates = sorted({one.rate for one in task.tried if one.rate})
    methods = list(dict.fromkeys(one.method for one in task.tried if one.rate))
    tried = {(one.method, one.rate): one for one in task.tried}
    wanted: list[tuple[str, str | None]] = [(test, test) for test in task.validation_tests]
    if any(one.eval_loss is not None for one in task.tried) or not wanted:
        wanted.append(("loss on --eval_data_path", None))
    return [
        table(
            [title, *(f"{rate:g}" for rate in rates)],
            [[method, *(_validated(tried.get((method, rate)), test) for rate in rates)] for method in methods],
        )
        for title, test in wanted
    ]


def _validated(one: Tried | None, test: str | None) -> str:
    """Return the cell of a method and a learning rate."""
    if one is None:
        return ""
    value = spread(one.scores[test]) if test is not None else spread(one.eval_loss, 3)
    lost = [f"{count} {word}" for count, word in ((one.diverged, "diverged"), (one.failed, "failed")) if count]
    text = value + (f" ({', '.join(lost)} of {one.seeds})" if lost else "")
    return f"**{text}**" if one.chosen else text


def _ended(ended: Iterable[Ended]) -> str:
    head = ["task", "method", "learning rate", "seed", "what happened", "why"]
    rows = [
        [one.task, one.method, _rate(one.rate or None), str(one.seed), f"{one.status} ({one.split})", _short(one.error)]
        for one in ended
    ]
    return table(head, rows, left=len(head))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 4] + " ..."
