"""The sub-command `plan`: checks the flags of a training and prints what it would train and need."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

# How typer is to register `plan`: it passes on the flags of a training as they are.
SETTINGS: dict[str, Any] = {
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True},
    "options_metavar": "[--json] [--gpu NAME] [--gpus N] [--sequence N] [the flags of a training]",
}


def plan(
    flags: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    gpu: Annotated[
        str | None, typer.Option(help="Compare with this GPU's memory: its name (A100-80GB), or GiB.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="Number of GPUs that share the work.")] = 1,
    sequence: Annotated[
        int | None,
        typer.Option(help="Length of the longest rows in tokens, image included; default: --model_max_length."),
    ] = None,
) -> None:
    """Check a training's flags, count what it would train and how much memory it needs, from config.json alone.

    Paste the flags of your training script as they are; --output_dir may be absent. Status 1 if it would not start.
    """
    from llava_steering_plugin.errors import ArgumentsError, listing
    from llava_steering_plugin.planning.from_flags import Wanted
    from llava_steering_plugin.planning.plan import plan as made_from
    from llava_steering_plugin.training.settings.flags import CANNOT_START

    made = made_from(flags.args, Wanted(gpu, gpus, sequence))
    if as_json:
        typer.echo(json.dumps(made.as_json(), indent=2))
        raise typer.Exit(1 if made.problems else 0)
    if made.problems:
        raise ArgumentsError(listing(CANNOT_START, made.problems))
    if made.full_name is not None and made.counts is not None:
        from llava_steering_plugin.adapters.counts import parameter_table
        from llava_steering_plugin.cli.tables import console
        from llava_steering_plugin.planning.report import memory_table

        output = console()
        output.print(parameter_table(made.full_name, made.counts))
        if made.memory is not None:
            output.print(memory_table(made.memory))
    for note in made.notes:
        typer.echo(f"note: {note}")
