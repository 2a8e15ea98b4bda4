"""Write what comes out of a comparison, from results.jsonl and the files that it names: tables and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_steering_plugin import __version__
from llava_steering_plugin.comparison.records import FILE, Record, read_records
from llava_steering_plugin.comparison.results.markdown import markdown
from llava_steering_plugin.comparison.results.plot import draw
from llava_steering_plugin.comparison.results.rows import csv_text
from llava_steering_plugin.comparison.results.summarising import summarise
from llava_steering_plugin.comparison.results.summary import Summary
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.whole_files import partials

MARKDOWN, CSV, PICTURE = "results.md", "results.csv", "results"
# What `llava-steering report` draws.
DOCUMENT = "results.json"
MEASURE = "comparison"


def write_results(output: Path, *, reference: str | None = None, records: Sequence[Record] | None = None) -> list[Path]:
    """Write results.md, results.csv, results.json and the plot as results.png and results.svg.

    The same records give the same bytes.

    Args:
        output: the folder of results.jsonl; the files that its lines name are below it.
        reference: the method from which the others differ; None: the first that is trained.
        records: these are taken in the place of results.jsonl, in the order in which tasks and methods are shown.

    Raises:
        ArgumentsError: there are no results, no such method, files of single questions cannot be read, matplotlib is
            missing, or something cannot be written; tables are then written, and the plot is not.
    """
    found = read_records(output / FILE) if records is None else records
    summary = summarise(found, output, reference)
    try:
        pictures = draw(summary, output / PICTURE)
    except ArgumentsError:
        _write(output, summary, None)
        raise
    tables = _write(output, summary, next((file.name for file in pictures if file.suffix == ".png"), None))
    return [*tables, *pictures]


def document_of(summary: Summary) -> dict[str, Any]:
    """Return a summary as JSON values, as `llava-steering report` takes it."""
    return {"measure": MEASURE, "plugin_version": __version__, "date": summary.ended_at, **asdict(summary)}


def _write(output: Path, summary: Summary, picture: str | None) -> list[Path]:
    texts = {
        MARKDOWN: markdown(summary, picture),
        CSV: csv_text(summary),
        DOCUMENT: json.dumps(document_of(summary), indent=1, allow_nan=False) + "\n",
    }
    files = [output / name for name in texts]
    try:
        with partials(*files) as parts:
            for part, text in zip(parts, texts.values(), strict=True):
                part.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise ArgumentsError(f"{output} cannot be written: {error.strerror or error}.") from error
    return files
