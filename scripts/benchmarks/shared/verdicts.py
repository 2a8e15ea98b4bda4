"""Judge what was measured against limits, and write the results to a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Verdict:
    """One criterion: its name, the measured value, and the largest value that passes."""

    what: str
    measured: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.measured <= self.limit


def table_of_verdicts(verdicts: Sequence[Verdict]) -> Table:
    """Return a table with one row for each criterion."""
    table = Table(title="criteria", title_justify="left")
    for heading in ("what", "measured", "at most", ""):
        table.add_column(heading)
    for verdict in verdicts:
        result = "passed" if verdict.passed else "FAILED"
        table.add_row(verdict.what, f"{verdict.measured:.4g}", f"{verdict.limit:g}", result)
    return table


def table_of(title: str, columns: Sequence[str]) -> Table:
    """Return an empty table: the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for place, heading in enumerate(columns):
        table.add_column(heading, justify="right" if place else "left")
    return table


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a benchmark's results; dataclasses become plain objects."""
    path.write_text(json.dumps(content, indent=2, default=asdict) + "\n", encoding="utf-8")
