"""The sub-command `convert`: makes an adapter folder of a checkpoint of the authors' code."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a checkpoint of the authors' code.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New folder for the adapter.")],
    base: Annotated[
        str | None, typer.Option(help="The model it was trained on: folder or hub id; default: the one SRC names.")
    ] = None,
    conversation: Annotated[
        str | None, typer.Option(metavar="NAME", help="LLaVA's conversation template that it was trained with.")
    ] = None,
    projector: Annotated[
        bool, typer.Option(help="Copy SRC's projector into the adapter if the base has none or another one.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace the adapter in DST.")] = False,
) -> None:
    """Make an adapter folder from a MoReS or MixLoRA checkpoint that the papers' authors released."""
    from llava_steering_plugin.cli.tables import console, conversion_tables
    from llava_steering_plugin.convert.conversion import convert as converted
    from llava_steering_plugin.errors import Problems
    from llava_steering_plugin.upstream.text.conversations import checked_template

    problems = Problems()
    if conversation is not None:
        with (
            problems.noted(),
            suppress(ImportError, RuntimeError, ValueError),
        ):  # without a LLaVA that imports, the name is not checked
            checked_template(conversation)
    done = converted(
        source, target, base, projector=projector, conversation=conversation, force=force, problems=problems
    )
    output = console(plain=True)
    for table in conversion_tables(done):
        output.print(table)
