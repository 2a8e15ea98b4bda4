"""The sub-command `compare`: from the file of a comparison to its results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from llava_steering_plugin.comparison.cells import Plan


def compare(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What to compare, in YAML; see docs/comparing.md.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the cells and their parameters, and end.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="How many cells run at the same time; default: as the file says.")
    ] = None,
) -> None:
    """Compare methods over learning rates, seeds and tasks: each cell is a training of its own.

    Learning rates are chosen on validation data; test data is answered once. After an interruption, the same command
    goes on where it ended. Status 1 if it cannot start, or not everything was compared; 130 if it was interrupted.
    """
    from dataclasses import replace

    from llava_steering_plugin.cli.tables import console
    from llava_steering_plugin.comparison.board import Board
    from llava_steering_plugin.comparison.reading import read_comparison
    from llava_steering_plugin.comparison.run import Interrupted
    from llava_steering_plugin.comparison.run import compare as run
    from llava_steering_plugin.errors import listing

    comparison = read_comparison(file)
    if processes is not None:
        comparison = replace(comparison, processes=processes)
    shown = console(plain=True)
    if dry_run:
        from llava_steering_plugin.comparison.run import checked_plan

        _print(checked_plan(comparison, Board(shown)), shown)
        return
    try:
        outcome = run(comparison, Board(shown))
    except Interrupted as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(130) from None
    for written in outcome.files:
        typer.echo(str(written))
    if outcome.problems:
        typer.echo(listing("not everything was compared", outcome.problems), err=True)
        raise typer.Exit(1)


def _print(plan: Plan, shown: Console) -> None:
    """Print the cells of a comparison, and what each would train."""
    from rich.table import Table
    from rich.text import Text

    from llava_steering_plugin.comparison.parameters import count_parameters

    counts = {}
    table = Table(title=f"{len(plan.cells)} cells", title_justify="left")
    for column in ("task", "method", "learning rate", "seed", "parameters", "of the projector"):
        table.add_column(column, justify="left" if column in ("task", "method") else "right")
    for cell in plan.cells:
        if cell.method.name not in counts:
            counts[cell.method.name] = count_parameters(cell, plan.comparison)
        own = counts[cell.method.name]
        numbers = ["not known" if count is None else f"{count:,}" for count in (own.own, own.projector)]
        settings = ["", ""] if cell.method.frozen else [f"{cell.rate:g}", str(cell.seed)]
        table.add_row(*map(Text, [cell.task.name, cell.method.name, *settings, *numbers]))
    shown.print(table)
    trained = [cell for cell in plan.cells if not cell.method.frozen]
    tests = {(cell.task.name, cell.method.name, cell.seed) for cell in plan.cells}
    shown.print(f"{len(trained)} trainings, {len(plan.cells)} validations, {len(tests)} tests of chosen cells")
