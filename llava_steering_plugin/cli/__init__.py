"""The command line `llava-steering`: puts the sub-commands together, each in a file of its own.

A sub-command imports what it needs when it runs, so that `--help` and `patch` answer at once. A SteeringError becomes
one message on standard error and exit status 1; wrong usage is status 2.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from llava_steering_plugin.cli import (
    chat,
    check_data,
    checkout,
    compare,
    components,
    convert,
    diagnose,
    evaluate,
    export,
    plan,
    prepare,
    report,
    score,
    serve,
)
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.lazy_imports import defer_compilation

app = typer.Typer(
    name="llava-steering",
    help="Parameter-efficient tuning modes for LLaVA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from llava_steering_plugin import __version__

        typer.echo(f"llava-steering {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Log everything; show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING)


app.command("patch")(checkout.patch)
app.command("unpatch")(checkout.unpatch)
app.command("doctor", short_help="Show which LLaVA this is, and what the plugin finds in it.")(checkout.doctor)
app.command("plan", short_help="Show what a training would train, and whether it fits on a GPU.", **plan.SETTINGS)(
    plan.plan
)
app.command("components", short_help="List towers, connectors and language models by name.")(components.components)
app.command("check-data", short_help="Find the samples that LLaVA cannot be trained on; count tokens.")(
    check_data.check_data
)
app.command("convert", short_help="Make an adapter folder from a MoReS or MixLoRA checkpoint.")(convert.convert)
app.command("export", short_help="Write a LLaVA as transformers' own Llava, or back.")(export.export)
app.command("prepare", short_help="Make LLaVA's files of a benchmark that lies on disk.")(prepare.prepare)
app.command("eval", short_help="Answer a file of questions in batches, each with its adapter.")(evaluate.evaluate)
app.command("score", short_help="Score answers by the official rule of a benchmark.")(score.score)
app.command("compare", short_help="Compare methods over learning rates, seeds and tasks.")(compare.compare)
app.add_typer(diagnose.app, name="diagnose")
app.command("report", short_help="Draw results of diagnose and of trainings as one page.")(report.report)
app.command("serve", short_help="Serve many adapters on one base, with LLaVA's web page.")(serve.serve)
app.command("chat", short_help="Chat with a model and its adapters in the terminal.")(chat.chat)


def main() -> None:
    """Run the console script."""
    defer_compilation()
    try:
        app()
    except SteeringError as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            raise
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(1)
