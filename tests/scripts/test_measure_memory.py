"""scripts/measure_memory.py: the memory that a plan predicts is the memory that a training takes, to 20 %."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import subprocess_environment

SCRIPT = Path(__file__).parents[2] / "scripts" / "measure_memory.py"


@pytest.mark.slow
def test_the_peak_of_a_training_of_a_hundred_million_parameters_is_the_predicted_one(
    patched_llava: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--only", "mores, projector trained, checkpointing off", "--json", "out.json"],
        cwd=tmp_path,
        env=subprocess_environment(patched_llava),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (found,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert abs(found["predicted"] / found["measured"] - 1) < 0.2
    assert found["measured"] > 400 * 2**20  # 105 million weights in float32
