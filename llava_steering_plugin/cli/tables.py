"""Tables of the command line: what `doctor`, `convert` and others print."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from llava_steering_plugin.training.data.sample_checks import KINDS, name_of

if TYPE_CHECKING:
    from llava_steering_plugin.checkout.doctor import Report
    from llava_steering_plugin.convert.conversion import Conversion
    from llava_steering_plugin.evaluation.scoring import Scores
    from llava_steering_plugin.export.exporting import Export
    from llava_steering_plugin.planning.data_report import DataReport

WIDTH_OF_A_FILE = 160


def console(*, plain: bool = False) -> Console:
    """Return a console on standard output, wide enough for tables where that is no terminal.

    Args:
        plain: print text as it is: no colours for numbers and paths, brackets are no markup.
    """
    return Console(highlight=not plain, markup=not plain, width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)


def doctor_table(report: Report) -> Table:
    """Return the report of `doctor` as a table."""
    table = _key_value_table()
    table.add_row("python", f"{report.python}, {report.executable}")
    if report.llava is not None:
        found = report.llava
        table.add_row("llava", f"{found.path} ({found.found_by})")
        table.add_row("", f"{found.distribution} {found.version}" if found.distribution else "not an installed package")
        if found.commit:
            table.add_row("", f"git commit {found.commit}")
        table.add_row("", found.state)
        for other in found.others:
            table.add_row("", f"another one: {other}")
    table.add_row("entry point", report.entry_point or "not visible")
    _add_rows(table, "seams", [f"{'found  ' if seam.found else 'MISSING'} {seam.name}" for seam in report.seams])
    if report.stopped:
        table.add_row("do not work", ", ".join(report.stopped))
    _add_rows(table, "packages", [f"{name} {version or '-'}" for name, version in report.packages.items()])
    _add_rows(table, "devices", report.devices)
    _add_rows(table, "PROBLEMS", report.problems)
    _add_rows(table, "next", report.next_steps)
    return table


def conversion_tables(done: Conversion) -> list[Table]:
    """Return the tables of a conversion: the new adapter, and what it does not carry over, if anything."""
    table = _key_value_table()
    table.add_row("adapter", str(done.folder))
    table.add_row("mode", f"{done.config.mode}, {done.parameters:,} parameters, {done.size:,} bytes")
    table.add_row("settings", ", ".join(f"{key} {value}" for key, value in done.config.settings.items()))
    table.add_row("base", str(done.config.base))
    _add_rows(table, "carries too", done.extras)
    _add_rows(table, "checked", done.checks)
    if not done.notes:
        return [table]
    lost = Table(title="Not carried over, or different here", title_justify="left")
    lost.add_column("in the checkpoint", no_wrap=True)
    lost.add_column("what becomes of it", overflow="fold")
    for note in done.notes:
        lost.add_row(note.entry, note.what)
    return [table, lost]


def export_table(done: Export) -> Table:
    """Return what was exported, what was compared, and what to know about it."""
    table = _key_value_table()
    table.add_row(f"{done.layout.value} model", str(done.folder))
    table.add_row("conversation", done.conversation)
    _add_rows(table, "checked", done.checks)
    _add_rows(table, "to know", done.notes)
    return table


def data_table(report: DataReport) -> Table:
    """Return the bad samples of a data file as a table: how many of each kind, and the first ones."""
    table = Table(title="Bad samples", title_justify="left")
    table.add_column("kind", no_wrap=True)
    table.add_column("samples", justify="right")
    table.add_column("the first ones", overflow="fold")
    for kind, meaning in KINDS.items():
        if count := report.kinds[kind]:
            of_kind = [problem for problem in report.problems if problem.kind == kind]
            lines = [f"{name_of(each.index, {'id': each.id})}: {each.reason}" for each in of_kind]
            if more := count - len({each.index for each in of_kind}):
                lines.append(f"... and {more:,} more")
            table.add_row(meaning, f"{count:,}", "\n".join(lines))
    return table


def score_table(scores: Scores) -> Table:
    """Return the numbers of a benchmark as a table: a row for all questions and for each group of them."""
    table = Table(title=scores.task, title_justify="left")
    names = list(dict.fromkeys(name for values in scores.metrics.values() for name in values))
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for group, values in scores.metrics.items():
        table.add_row(group, *(_number(values.get(name)) for name in names))
    return table


def _number(value: float | int | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def _key_value_table() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # users copy paths: break them, never shorten them
    return table


def _add_rows(table: Table, title: str, lines: Sequence[str]) -> None:
    """Add one row a line, with the title before the first."""
    for index, line in enumerate(lines):
        table.add_row("" if index else title, line)
