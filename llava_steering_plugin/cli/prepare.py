"""The sub-command `prepare`: from a benchmark's official folder to LLaVA's files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def prepare(
    task: Annotated[str, typer.Argument(metavar="TASK", help="The benchmark; docs/benchmarks-data.md has all.")],
    source: Annotated[Path, typer.Option(metavar="DIR", help="Its folder, in the official layout.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where LLaVA's files go; several tasks may share it.")],
    split: Annotated[str | None, typer.Option(help="Which part; default: the first that the benchmark has.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Draw as many questions; default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
) -> None:
    """Make LLaVA's training data and question file of a benchmark that lies on disk in its official layout.

    Images are linked and not copied. All samples are checked as a training checks them. Nothing is downloaded.
    """
    from llava_steering_plugin.cli.diagnose.progress import progress_bar
    from llava_steering_plugin.evaluation.preparing import prepare as prepared

    with progress_bar() as progress:
        made = prepared(
            task,
            source,
            output,
            split=split,
            samples=samples,
            seed=seed,
            progress=lambda done, total: progress("checked", done, total),
        )
    typer.echo(f"{made.entries:,} of {made.whole:,} questions; --image_folder {output / 'images'}")
    for file in (made.samples, made.questions):
        if file is not None:
            typer.echo(str(file))
