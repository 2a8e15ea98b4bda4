"""The sub-command `export`: writes a LLaVA as transformers' own Llava, and such a model as a LLaVA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A LLaVA, or a model of transformers' Llava class.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New folder for the model in the other layout.")],
    conversation: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="LLaVA's conversation template; default: that of its chat, by BASE's name."),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Picture on which both are compared; default: a photograph of gradio's.")
    ] = None,
    logits: Annotated[bool, typer.Option(help="Compare logits where the model fits into memory, in float32.")] = True,
) -> None:
    """Write a LLaVA as a folder of transformers' own Llava class, or such a folder as a LLaVA."""
    from llava_steering_plugin.cli.diagnose.progress import progress_bar
    from llava_steering_plugin.cli.tables import console, export_table
    from llava_steering_plugin.export.exporting import export as exported

    with progress_bar() as show:
        done = exported(str(base), target, conversation=conversation, image=image, logits=logits, progress=show)
    console(plain=True).print(export_table(done))
