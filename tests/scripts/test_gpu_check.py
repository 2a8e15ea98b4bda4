"""scripts/gpu_check.sh: without a GPU it says so, and with --tiny all of it runs on the processor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import subprocess_environment

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.sh"
VARIANTS = {"frozen", "MoReS r=1, 1%", "MoReS r=4, all", "MixLoRA E=16, r=4", "LoRA r=8", "LoRA r=128"}

pytestmark = pytest.mark.slow


def check(llava: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = subprocess_environment(llava, {"PYTHON": sys.executable})
    return subprocess.run([SCRIPT, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)


def test_without_a_gpu_it_is_one_clear_message(patched_llava: Path, tmp_path: Path) -> None:
    done = check(patched_llava, tmp_path)
    assert done.returncode == 2
    assert "no CUDA device is visible" in done.stderr and "--tiny" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_tiny_size_goes_through_everything_in_both_precisions(patched_llava: Path, tmp_path: Path) -> None:
    done = check(patched_llava, tmp_path, "--tiny", "--output", "figures")

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    made = json.loads((tmp_path / "figures" / "gpu_check.json").read_text())
    assert {(row["bits"], row["variant"]) for row in made["results"]} == {(b, v) for b in (16, 4) for v in VARIANTS}
    trained = {row["variant"]: row["parameters"] for row in made["results"]}
    # 2 layers of width 64: MoReS 2 d D + d each, LoRA r (in + out) of seven linears.
    assert trained["frozen"] == 0 and trained["MoReS r=1, 1%"] == 2 * (2 * 64 + 1)
    assert trained["LoRA r=8"] == 2 * 8 * (4 * (64 + 64) + 3 * (64 + 128))
    for row in made["results"]:
        assert row["seconds"] > 0 and row["tokens_per_second"] > 0 and row["prefill"] > 0 and row["peak"] > 0
        assert 0 < row["loss"] < 20
    assert made["machine"]["versions"]["torch"]
    assert made["tests"]["status"] in (None, 0, 5)
    assert "Training steps and generation" in done.stdout
