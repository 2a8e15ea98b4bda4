"""The program of scripts/eval_papers.sh: checks everything, shows what it is going to do, and does it."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from llava_steering_plugin.errors import ArgumentsError, Problems, SteeringError, nearest
from llava_steering_plugin.evaluation.scoring import check_writable, write_json
from llava_steering_plugin.inference import options as shared
from llava_steering_plugin.whole_files import write_whole
from papers.report import markdown, missing
from papers.runs import Request, eval_command, finished, run_task, source_of
from papers.tables import ENTRIES, FIGURES, Published, read_figures, shown_tables

REPORT = "report.md"


def main(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base model, a LLaVA: folder or hub id.")],
    data: Annotated[Path, typer.Option(help="Folder with a folder for each benchmark, named like it.")],
    output: Annotated[Path, typer.Option(help="Folder of all results. Finished benchmarks in it are used again.")],
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]ADAPTER", help="An adapter: folder or hub id. May be repeated.")
    ] = None,
    only: Annotated[str | None, typer.Option(help="Benchmarks, joined by commas; default: all.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Draw as many questions of each; default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    figures: Annotated[Path | None, typer.Option(help="More published rows, in a file like figures.json.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at the same time.")] = 8,
    conv_mode: Annotated[str | None, typer.Option(help="LLaVA's conversation template.")] = None,
    device: shared.Device = "auto",
    load_4bit: shared.Load4bit = False,
    load_8bit: shared.Load8bit = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and run nothing.")] = False,
) -> None:
    """Answer and score the papers' benchmarks whose data is there, with a base and its adapters.

    Prints the papers' tables, with published rows beside ours, and what to get for what was not run.
    After an interruption, the same command goes on where it ended.
    """
    console = Console()
    options = {"batch-size": str(batch_size), "device": device}
    options |= {"conv-mode": conv_mode} if conv_mode is not None else {}
    options |= {name: "" for name, given in (("load-4bit", load_4bit), ("load-8bit", load_8bit)) if given}
    try:
        tasks, request, published = _checked(
            Request(base, {}, data, output, samples, seed, options),
            adapter or [],
            only,
            figures,
            (load_4bit, load_8bit),
        )
        failed = _run(console, tasks, request, published, dry_run)
    except SteeringError as error:
        typer.echo(f"eval_papers: {error}", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(1 if failed else 0)


def _checked(
    request: Request, adapters: list[str], only: str | None, figures: Path | None, bits: tuple[bool, bool]
) -> tuple[list[str], Request, list[Published]]:
    """Return the benchmarks, the request with its adapters, and the published rows.

    Raises:
        SteeringError: everything that is wrong with the command line, at once.
    """
    from llava_steering_plugin.inference.base_files import is_llava, no_llava
    from llava_steering_plugin.inference.base_model import read_base_config
    from llava_steering_plugin.inference.sources import locate_all, read_sources

    problems = Problems()
    tasks = list(ENTRIES)
    with problems.noted():
        tasks = [task.strip() for task in only.split(",")] if only is not None else tasks
        unknown = [f"{task!r} {nearest(task, ENTRIES)}".strip() for task in tasks if task not in ENTRIES]
        if unknown:
            raise ArgumentsError(f"--only: no benchmark {'; '.join(unknown)}. There are {', '.join(ENTRIES)}.")
    with problems.noted():
        if not request.data.is_dir():
            raise ArgumentsError(f"--data {request.data} is no folder: it holds a folder for each benchmark.")
    with problems.noted():
        check_writable(request.output / REPORT)
    with problems.noted():
        if not is_llava(config := read_base_config(request.base)):
            raise no_llava(request.base, config)
    with problems.noted():
        shared.choose_device(request.options["device"])
    with problems.noted():
        shared.check_bits(*bits, request.options["device"])
    sources = read_sources(adapters, problems)
    locate_all(sources, problems)
    published: list[Published] = []
    for file in (FIGURES, *([figures] if figures is not None else [])):
        with problems.noted():
            published += read_figures(file)
    problems.raise_any("this cannot be evaluated")
    made = replace(request, adapters=sources, data=request.data.resolve(), output=request.output.resolve())
    return list(dict.fromkeys(tasks)), made, published


def _run(console: Console, tasks: list[str], request: Request, published: list[Published], dry_run: bool) -> bool:
    """Run the benchmarks and write the report; return whether one has failed."""
    reasons = {task: reason for task in tasks if (reason := _why_not(request, task)) is not None}
    ready = [task for task in tasks if task not in reasons]
    todo = [task for task in ready if finished(request, task) is None]
    console.print(_overview(request, tasks, reasons, todo))
    if dry_run:
        for task in todo:
            console.print(shlex.join(eval_command(request, task)), soft_wrap=True, markup=False)
        for task, reason in reasons.items():
            console.print(f"{task}: {reason}", soft_wrap=True, markup=False)
        return False
    scores, failed, started = {}, False, time.monotonic()
    for task in ready:
        if task in todo:
            console.print(f"{task}: {todo.index(task) + 1} of {len(todo)}{_left(todo, task, started)}", markup=False)
        try:
            scores[task] = run_task(request, task)
        except SteeringError as error:
            failed = True
            reasons[task] = f"failed: {error}"
            console.print(f"{task} failed: {error}", markup=False)
    page = markdown(shown_tables(tasks), request.models, scores, published, reasons)
    write_whole(request.output / REPORT, page)
    write_json(request.output / "report.json", {"models": request.models, "scores": scores, "not_run": reasons})
    console.print(page, markup=False, soft_wrap=True)
    console.print(f"{request.output / REPORT}, and report.json beside it", markup=False, soft_wrap=True)
    return failed


def _why_not(request: Request, task: str) -> str | None:
    """Return why a benchmark cannot be run; None: it can."""
    if source_of(request, task) is None:
        folder = " or ".join(str(request.data / name) for name in ENTRIES[task].folders or (task,))
        return missing(task, folder)
    if task == "flickr30k":
        needed = [] if importlib.util.find_spec("pycocoevalcap") else ["pip install 'llava-steering-plugin[scores]'"]
        needed += [] if shutil.which("java") else ["Java"]
        if needed:
            return f"captions are scored by pycocoevalcap, which needs {' and '.join(needed)}."
    return None


def _overview(request: Request, tasks: list[str], reasons: dict[str, str], todo: list[str]) -> Table:
    table = Table(title="Benchmarks", title_justify="left")
    for column in ("benchmark", "split", "state"):
        table.add_column(column)
    for task in tasks:
        state = "to run" if task in todo else "done before"
        if task in reasons:
            state = "not there" if source_of(request, task) is None else "cannot be scored"
        table.add_row(task, ENTRIES[task].split, state)
    return table


def _left(todo: list[str], task: str, started: float) -> str:
    """Say how long the rest may take, from the time of those that are done."""
    done = todo.index(task)
    if not done:
        return ""
    minutes = (time.monotonic() - started) / done * (len(todo) - done) / 60
    return f", about {minutes:.0f} minutes left"
