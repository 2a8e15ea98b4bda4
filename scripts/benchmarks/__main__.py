"""Run a benchmark: `python scripts/benchmarks COMMAND`, from any folder."""

from __future__ import annotations

import sys
from pathlib import Path

# Python puts this folder first on the path. Its modules are imported from the package `benchmarks` instead.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.commands import app

app()
