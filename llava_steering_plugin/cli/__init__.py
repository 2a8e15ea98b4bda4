"""The command line `llava-steering`: a thin composition of sub-commands.

Each sub-command imports what it needs when it runs, so that `--help` and `patch` answer at once. A SteeringError
becomes one message on standard error and exit status 1; wrong usage is status 2.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from llava_steering_plugin.cli.chat import chat
from llava_steering_plugin.cli.evaluate import evaluate
from llava_steering_plugin.cli.serve import serve
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.lazy_imports import defer_compilation

if TYPE_CHECKING:
    from llava_steering_plugin.checkout.doctor import Report
    from llava_steering_plugin.checkout.find import Llava
    from llava_steering_plugin.convert.conversion import Conversion

app = typer.Typer(
    name="llava-steering",
    help="Parameter-efficient tuning modes for LLaVA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

LlavaOption = Annotated[
    Path | None,
    typer.Option("--llava", metavar="PATH", help="A LLaVA checkout or its llava folder; default: what Python imports."),
]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Log everything; show tracebacks.")] = False) -> None:
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING)


@app.command()
def patch(llava: LlavaOption = None) -> None:
    """Add the plugin block to llava/__init__.py."""
    from llava_steering_plugin.checkout.find import find_llava
    from llava_steering_plugin.checkout.patch import patch as write_block

    used = find_llava(llava)
    if write_block(used):
        typer.echo(f"patched {used.init}; undo with `llava-steering unpatch`")
    else:
        typer.echo(f"{used.init} is already patched; nothing to do")
    _mention_others(used)


@app.command()
def unpatch(llava: LlavaOption = None) -> None:
    """Remove the plugin block; every other byte stays."""
    from llava_steering_plugin.checkout.find import find_llava
    from llava_steering_plugin.checkout.patch import unpatch as remove_block

    used = find_llava(llava)
    if remove_block(used):
        typer.echo(f"removed the block from {used.init}")
    else:
        typer.echo(f"{used.init} is not patched; nothing to do")
    _mention_others(used)


@app.command()
def doctor(
    llava: LlavaOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show which LLaVA this is, what the plugin finds in it, and what to do next. Status 1 if something is wrong."""
    from llava_steering_plugin.checkout.doctor import examine

    report = examine(llava)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        _show(report)
    if report.problems:
        raise typer.Exit(1)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    options_metavar="[--json] [--gpu NAME] [--gpus N] [--sequence N] [the flags of a training]",
)
def plan(
    flags: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    gpu: Annotated[str | None, typer.Option(help="Does it fit this card? Its name (A100-80GB), or its GiB.")] = None,
    gpus: Annotated[int, typer.Option(help="How many GPUs share the work.")] = 1,
    sequence: Annotated[
        int | None, typer.Option(help="Positions of the longest rows with their image; default: --model_max_length.")
    ] = None,
) -> None:
    """Check a training's flags, count what it would train and how much memory it needs, from config.json alone.

    Paste the flags of your training script as they are; --output_dir may be absent. Status 1 if it would not start.
    """
    from llava_steering_plugin.errors import ArgumentsError, listing
    from llava_steering_plugin.planning.from_flags import Wanted
    from llava_steering_plugin.planning.plan import plan as made_from
    from llava_steering_plugin.training.flags import CANNOT_START

    made = made_from(flags.args, Wanted(gpu, gpus, sequence))
    if as_json:
        typer.echo(json.dumps(made.as_json(), indent=2))
        raise typer.Exit(1 if made.problems else 0)
    if made.problems:
        raise ArgumentsError(listing(CANNOT_START, made.problems))
    if made.mode is not None and made.counts is not None:
        from llava_steering_plugin.adapters.counts import parameter_table
        from llava_steering_plugin.planning.report import memory_table

        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(parameter_table(made.mode, made.counts))
        if made.memory is not None:
            console.print(memory_table(made.memory))
    for note in made.notes:
        typer.echo(f"note: {note}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a checkpoint of the authors' code.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New folder for the adapter.")],
    base: Annotated[
        str | None, typer.Option(help="The model it was trained on: folder or hub id; default: what SRC names.")
    ] = None,
    conversation: Annotated[
        str | None, typer.Option(metavar="NAME", help="LLaVA's conversation template that it was trained with.")
    ] = None,
    projector: Annotated[
        bool, typer.Option(help="Take along SRC's projector, where the base lacks it or has another one.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace the adapter that is in DST.")] = False,
) -> None:
    """Make an adapter folder of a MoReS or MixLoRA checkpoint that the papers' authors released."""
    from llava_steering_plugin.convert.conversion import convert as converted
    from llava_steering_plugin.upstream.conversations import checked_template

    if conversation is not None:
        with suppress(ImportError, RuntimeError, ValueError):  # without a LLaVA that imports there is nobody to ask
            checked_template(conversation)
    _show_conversion(
        converted(source, target, base, projector=projector, conversation=conversation, force=force),
        Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160),
    )


app.command("eval")(evaluate)
app.command()(serve)
app.command()(chat)


def _show_conversion(done: Conversion, console: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("adapter", str(done.folder))
    table.add_row("mode", f"{done.config.mode}, {done.parameters:,} parameters, {done.size:,} bytes")
    table.add_row("settings", ", ".join(f"{key} {value}" for key, value in done.config.settings.items()))
    table.add_row("base", str(done.config.base))
    for index, name in enumerate(done.extras):
        table.add_row("" if index else "carries too", name)
    for index, check in enumerate(done.checks):
        table.add_row("" if index else "checked", check)
    console.print(table)
    if done.notes:
        lost = Table(title="Not carried over, or different here", title_justify="left")
        lost.add_column("in the checkpoint", no_wrap=True)
        lost.add_column("what becomes of it", overflow="fold")
        for note in done.notes:
            lost.add_row(note.entry, note.what)
        console.print(lost)


def _mention_others(used: Llava) -> None:
    from llava_steering_plugin.checkout.find import other_llavas

    for other in other_llavas(used):
        typer.echo(f"note: there is another LLaVA, left as it is: {other.package} ({other.found_by})")


def _show(report: Report) -> None:
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # paths are there to be copied: break them, never shorten them
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
    for index, seam in enumerate(report.seams):
        table.add_row("" if index else "seams", f"{'found  ' if seam.found else 'MISSING'} {seam.name}")
    if report.stopped:
        table.add_row("do not work", ", ".join(report.stopped))
    for index, (name, version) in enumerate(report.packages.items()):
        table.add_row("" if index else "packages", f"{name} {version or '-'}")
    for index, device in enumerate(report.devices):
        table.add_row("" if index else "devices", device)
    for index, problem in enumerate(report.problems):
        table.add_row("" if index else "PROBLEMS", problem)
    for index, step in enumerate(report.next_steps):
        table.add_row("" if index else "next", step)
    console.print(table)


def main() -> None:
    """Entry of the console script."""
    defer_compilation()
    try:
        app()
    except SteeringError as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            raise
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(1)
