"""The program of scripts/all_combinations.sh: runs combinations, each in its own process, and prints their table."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.combinations.cells import COVERED, Cell, all_cells, pairwise, possible
from experiments.combinations.outcomes import FAILED, OK, REFUSED, RESULTS, Outcome, read
from experiments.combinations.parts import find_timm
from experiments.combinations.running import Runner, prepared
from experiments.combinations.table import markdown, short
from llava_steering_plugin.comparison.provenance import provenance
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.whole_files import write_whole

TABLE = "table.md"


def main(
    output: Annotated[Path, typer.Option(help="Folder of all results. Finished combinations are used again.")] = Path(
        "combinations-output"
    ),
    pairs: Annotated[bool, typer.Option("--pairs", help="At most 40 in which every pair of parts occurs.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Combinations with this in their name, such as qwen2+siglip. May be repeated."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Combinations that run at the same time, one thread each.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and run nothing.")] = False,
) -> None:
    """Train, save, load, ask and resume every language model with every tower, connector and tuning method.

    The models are tiny and random; trainings have two steps. Prints a table. After an interruption, the same command
    goes on where it ended; what has failed is run again. The exit status is 1 if something failed, or was refused that
    should work, or the other way round.
    """
    console = Console()
    cells = [cell for cell in all_cells() if not only or any(text in cell.name for text in only)]
    if pairs:
        cells = pairwise(cell for cell in cells if possible(cell) and cell.connector in COVERED)
    try:
        if not cells:
            text = " ".join(only or [])
            raise ArgumentsError(f"--only {text}: no combination has this in its name, such as {all_cells()[0].name}")
        with _alone_in(output.resolve(), console) as folder:
            outcomes = _run(console, cells, folder, jobs, dry_run)
            if not dry_run:
                table = markdown(outcomes)
                write_whole(folder / TABLE, table)
    except (ArgumentsError, OSError) as error:
        typer.echo(f"combinations: {error}", err=True)
        raise typer.Exit(2) from None
    if not dry_run:
        console.print(table, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(0 if _as_expected(console, cells, outcomes, folder) else 1)


def _run(console: Console, cells: Sequence[Cell], output: Path, jobs: int, dry_run: bool) -> dict[Cell, Outcome]:
    """Run what has not been run yet, or has failed, or was run with other versions; return all outcomes."""
    found = provenance()
    made_by = {"versions": found.versions, **found.git}
    there = read(output / "results", cells)
    done = {
        cell: outcome
        for cell, outcome in there.items()
        if outcome.result != FAILED and outcome.made_by.get("versions") == found.versions
    }
    todo = [cell for cell in cells if cell not in done]
    console.print(f"{len(cells)} combinations, {len(done)} of them finished before", highlight=False)
    if dry_run:
        for cell in todo:
            console.print(cell.name, markup=False, highlight=False, soft_wrap=True)
        return done
    if not todo:
        return done
    find_timm()
    runner = Runner(output, made_by)
    with console.status("importing LLaVA and building the models"):
        parts = prepared(output)
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (BarColumn(), MofNCompleteColumn(), *times, TextColumn("{task.description}"))
    with Progress(*columns, console=console, speed_estimate_period=600) as progress:
        task = progress.add_task("", total=len(todo))

        def ended(cell: Cell, outcome: Outcome) -> None:
            done[cell] = outcome
            progress.update(task, advance=1, description=cell.name)
            if outcome.result == FAILED:
                line = f"{cell.name} failed: {short(outcome.reason)}"
                progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

        runner.run(todo, parts, jobs, ended)
    return done


def _as_expected(console: Console, cells: Sequence[Cell], outcomes: Mapping[Cell, Outcome], output: Path) -> bool:
    """Say how many combinations work and which came out otherwise than they should; tell whether there is none."""
    wrong = [cell for cell in cells if outcomes[cell].result != (OK if possible(cell) else REFUSED)]
    counts = {result: sum(each.result == result for each in outcomes.values()) for result in RESULTS}
    console.print(", ".join(f"{count} {result}" for result, count in counts.items()), highlight=False)
    for cell in wrong:
        should = "should work" if possible(cell) else "should be refused"
        line = f"{cell.name} {should}; {outcomes[cell].result}: {short(outcomes[cell].reason)}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{output / TABLE}; logs of failures in {output / 'logs'}", highlight=False, soft_wrap=True)
    return not wrong


@contextmanager
def _alone_in(output: Path, console: Console) -> Iterator[Path]:
    """Keep the folder for this process and those that it forks, for the block.

    After a kill, combinations that were running keep it until they end, in seconds.

    Raises:
        ArgumentsError: it cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("a")
    except OSError as error:
        raise ArgumentsError(f"--output {output} cannot be written: {error.strerror}. Choose another.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"waiting for what still runs in {output}", highlight=False, soft_wrap=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield output
