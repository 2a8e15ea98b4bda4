"""The benchmark of several clients (`scripts/benchmarks/serving_requests.py`): how it judges, and a quick run."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quick_runs import SCRIPTS, quick_run
from tiny_llava import TinyLlava


def result(gain: float, alone: float, later: float, noise: float = 0.0) -> dict[str, Any]:
    ratios = {1: (alone, 9.0), 4: (1.0, later), 16: (gain, later)}
    control = {name: [1 - noise, 1 + noise / 2] for name in ("gain", "later")}
    clients = {
        count: {"gain": [of], "later": [to], "control": control if count < 16 else None}
        for count, (of, to) in ratios.items()
    }
    return {"shape": "small", "clients": clients}


@pytest.mark.parametrize(
    ("measured", "failed"),
    [
        ((3.1, 1.01, 0.9), 0),
        ((2.9, 1.01, 0.9), 1),
        ((3.1, 0.9, 0.9), 1),
        ((3.1, 1.01, 1.2), 2),
        ((3.1, 0.9, 0.9, 0.2), 0),  # within the control's noise
        ((2.9, 0.7, 1.3, 0.2), 4),  # beyond it, and there is none of 16 clients
    ],
)
def test_sixteen_clients_have_to_gain_one_may_not_lose_and_nobody_may_wait_longer(
    measured: tuple[float, ...], failed: int
) -> None:
    from benchmarks.serving_targets import table_of_targets, targets

    judged = targets([result(*measured)])
    assert sum(not target.met for target in judged) == failed
    assert sum(target.verdict == "NOT MET" for target in judged) == failed
    assert table_of_targets(judged).row_count == 4


KILLED = """
import os, signal, sys
from pathlib import Path
from benchmarks.serving_requests import running

with running(Path(sys.argv[1]), 1, 1) as address:
    print(address, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_worker_ends_with_a_benchmark_that_is_killed(tiny: TinyLlava, tmp_path: Path) -> None:
    (tmp_path / "llava-v1.5-random").symlink_to(tiny.llava)
    (tmp_path / "adapters").mkdir()
    benchmark = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path], cwd=SCRIPTS, stdout=subprocess.PIPE, text=True, timeout=300
    )  # returns when the worker, too, has closed its output
    port = int(benchmark.stdout.rpartition(":")[2])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.slow
def test_a_quick_run_answers_everybody_with_batches_and_without(tmp_path: Path) -> None:
    (found,) = quick_run("serving", tmp_path, "--clients")["results"]
    assert set(found["clients"]) == {"1", "4", "16"}
    for of in found["clients"].values():
        assert all(each["rate"] > 0 and each["first"] > 0 for batch in (1, 8) for each in of[f"batch {batch}"])
