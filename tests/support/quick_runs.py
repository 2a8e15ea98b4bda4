"""Run the benchmarks with --quick, as a user does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from training_runs import subprocess_environment

SCRIPTS = Path(__file__).parents[2] / "scripts"


def quick_run(command: str, folder: Path, *more: str) -> dict[str, Any]:
    """Return what a benchmark writes with --quick. Its times may pass or fail: that depends on the machine's load."""
    file = folder / "bench.json"
    result = subprocess.run(
        [sys.executable, str(SCRIPTS / "benchmarks"), command, "--quick", "--json", str(file), *more],
        env=subprocess_environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    written: dict[str, Any] = json.loads(file.read_text())
    assert result.returncode == (0 if written["passed"] else 1), result.stderr
    assert {"processor", "torch", "date", "clock"} <= written["machine"].keys()
    return written
