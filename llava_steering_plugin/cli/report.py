"""The sub-command `report`: draws results of `diagnose` and of trainings as one page of HTML."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from llava_steering_plugin.errors import ArgumentsError, Problems


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER_OR_FILE",
            help="Folders of diagnose or of trainings, searched two levels deep, or single results.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page, such as report.html.")],
    title: Annotated[str, typer.Option(help="The page's title.")] = "Diagnostics report",
) -> None:
    """Draw results of diagnose and of trainings as one page of HTML, from their JSON alone.

    Several results of one measure stand in the same figures. The page loads nothing from the network.
    """
    missing = [name for name in ("jinja2", "plotly") if find_spec(name) is None]
    if missing:
        raise ArgumentsError(
            f"reports need {' and '.join(missing)}: pip install 'llava-steering-plugin[diagnostics]' "
            "(in this folder's clone: pip install -e '.[diagnostics]')"
        )
    from llava_steering_plugin.diagnostics.report.page import check_output, make_page, write_page
    from llava_steering_plugin.diagnostics.report.search import find_runs

    problems = Problems()
    runs = []
    with problems.noted():
        runs = find_runs(results, problems)
    with problems.noted():
        check_output(output, [file for run in runs for file in run.files])
    text = make_page(runs, title, problems) if runs else ""
    problems.raise_any("this cannot be drawn")
    write_page(text, output)
    typer.echo(str(output))
