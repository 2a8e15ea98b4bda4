"""Make one page of HTML of some results, which loads nothing from elsewhere, and write it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly import io, offline

from llava_steering_plugin import __version__
from llava_steering_plugin.diagnostics.report.parts import Figure, Run, Section
from llava_steering_plugin.diagnostics.report.registry import MEASURES, Measure
from llava_steering_plugin.errors import ArgumentsError, Problems
from llava_steering_plugin.whole_files import write_whole

# The buttons are named one by one: among those that plotly shows otherwise is one that uploads a figure.
CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
}


# What reading a document of another form raises: a key is missing, or something else stands where a number should.
OTHER_FORM = (KeyError, TypeError, ValueError, IndexError, AttributeError)


def make_page(runs: Sequence[Run], title: str, problems: Problems) -> str:
    """Return the HTML of a page on some results. The same results give the same bytes.

    Args:
        problems: gets the errors: documents of another form, or nothing but measures that are unknown here.
    """
    sections = list(_sections(runs, problems))
    unknown = [run for run in runs if run.measure not in MEASURES]
    with problems.noted():
        if len(unknown) == len(runs):
            names = ", ".join(f"{run.files[0]} ({run.measure})" for run in unknown)
            raise ArgumentsError(f"llava-steering-plugin {__version__} can draw none of these: {names}.")
    environment = Environment(
        loader=PackageLoader("llava_steering_plugin.diagnostics.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    numbers = count(1)

    def drawn(figure: Figure) -> Any:
        return Markup(
            io.to_html(
                figure.drawing,
                full_html=False,
                include_plotlyjs=False,
                config=CONFIG,
                div_id=f"figure-{next(numbers)}",
                default_height=f"{figure.drawing.layout.height}px",
            )
        )

    return environment.get_template("page.html").render(
        title=title,
        sections=sections,
        unknown=unknown,
        version=__version__,
        plotly=Markup(offline.get_plotlyjs()),
        drawn=drawn,
    )


def check_output(output: Path, inputs: Sequence[str]) -> None:
    """Check that a file can be written, as far as this is known before; nothing is left behind.

    Raises:
        ArgumentsError: it cannot, or it is one of the results.
    """
    if output.is_dir():
        raise ArgumentsError(f"--output {output} is a folder. Give the name of a file, such as {output}/report.html.")
    if output.absolute() in {Path(file).absolute() for file in inputs}:
        raise ArgumentsError(f"--output {output} is one of the results to draw. Choose another name.")
    folder = next(each for each in output.absolute().parents if os.path.lexists(each))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArgumentsError(f"--output {output} cannot be written: {error.strerror}. Choose another.") from error


def write_page(text: str, output: Path) -> None:
    """Write a page, whole or not at all.

    Raises:
        ArgumentsError: it cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, text)
    except OSError as error:
        raise ArgumentsError(f"--output {output} cannot be written: {error.strerror}. Choose another.") from error


def _sections(runs: Sequence[Run], problems: Problems) -> Iterator[Section]:
    """Draw what is known, a section for each measure. Where that fails, each document is tried alone, to name it."""
    for name, measure in MEASURES.items():
        own = [run for run in runs if run.measure == name]
        if not own:
            continue
        try:
            yield measure.section(own)
        except OTHER_FORM as error:
            failing = {run.files: why for run in own if (why := _failure(measure, run)) is not None}
            for files, why in (failing or {tuple(file for run in own for file in run.files): error}).items():
                written_by = " and ".join(sorted({str(run.document.get("plugin_version", "unknown")) for run in own}))
                with problems.noted():
                    raise ArgumentsError(
                        f"{', '.join(files)}: no {name} result as llava-steering-plugin {__version__} draws them "
                        f"({type(why).__name__}: {why}); written by version {written_by}. Measure again, or "
                        "leave it out."
                    ) from why


def _failure(measure: Measure, run: Run) -> Exception | None:
    """Return why one document cannot be drawn; None if it can."""
    try:
        measure.section([run])
    except OTHER_FORM as error:
        return error
    return None
