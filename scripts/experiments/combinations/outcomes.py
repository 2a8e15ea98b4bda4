"""Keep what came out of each combination: one file each, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.combinations.cells import Cell
from llava_steering_plugin.whole_files import write_whole

RESULTS = OK, REFUSED, FAILED = "ok", "refused", "failed"


@dataclass(frozen=True)
class Outcome:
    """What came out of a combination.

    Attributes:
        result: "ok", "refused" or "failed".
        reason: the message of a refusal or a failure; the empty string if all went well.
        seconds: how long it took.
        ended: when, UTC in ISO 8601.
        made_by: versions of packages, and the commit of this project.
    """

    result: str
    reason: str
    seconds: float
    ended: str
    made_by: dict[str, Any]


def write(folder: Path, cell: Cell, outcome: Outcome) -> None:
    """Write the file of a combination.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(folder / f"{cell.name}.json", json.dumps(asdict(outcome), indent=1) + "\n")


def read(folder: Path, cells: Iterable[Cell]) -> dict[Cell, Outcome]:
    """Return the outcomes that are there. A file that is none of this program's is left out: it is run again."""
    found = {}
    for cell in cells:
        try:
            found[cell] = Outcome(**json.loads((folder / f"{cell.name}.json").read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            continue
    return found
