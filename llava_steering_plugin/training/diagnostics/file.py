"""Write diagnostics.jsonl: what is measured, and a line for each pass. docs/diagnostics.md describes the format."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from llava_steering_plugin import __version__
from llava_steering_plugin.whole_files import write_whole

logger = logging.getLogger(__name__)

NAME, FORMAT = "diagnostics.jsonl", 1
STEP = "step"


class DiagnosticsFile:
    """Writes the file of one training; a file that cannot be written is one warning, and the training goes on.

    Args:
        folder: the output folder.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self._warned = False

    def begin(self, header: Mapping[str, Any], step: int) -> None:
        """Begin the file, or go on with it: lines after the step that a training goes on from are taken out.

        The steps that they tell of come again. Lines that a killed process has left half-written go too.

        The first line also gets `format`, `plugin_version` and `date`, which is that of the training's start.

        Args:
            header: what is measured.
            step: of the checkpoint; 0 for a training from the start, which begins a new file.
        """
        before = self._lines() if step else []
        if any(line.get("samples", header["samples"]) != header["samples"] for line in before):
            logger.warning("%s: the lines before step %d are of other samples, so they do not compare", self.path, step)
        kept = [line for line in before if line.get(STEP, step + 1) <= step]
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        date = next((line["date"] for line in before if "date" in line), now)
        first = {"format": FORMAT, "plugin_version": __version__, "date": date, **header}
        self._written(lambda: write_whole(self.path, "".join(map(_line, [first, *kept]))))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add the line of one pass."""

        def write() -> None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(record))

        self._written(write)

    def _written(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            if not self._warned:
                logger.warning("%s cannot be written: %s. The log has its numbers", self.path, error.strerror)
            self._warned = True

    def _lines(self) -> list[dict[str, Any]]:
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(content, dict):
                found.append(content)
        return found


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content) + "\n"
