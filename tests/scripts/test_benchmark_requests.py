"""The benchmark of several clients (`scripts/benchmarks/serving_requests.py`): how it judges, and a quick run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from quick_runs import quick_run


def result(gain: float, alone: float, later: float) -> list[dict[str, Any]]:
    from benchmarks.serving_requests import EQUAL, UNEQUAL

    ratios = {1: (alone, 9.0), 4: (1.0, later), 16: (gain, later)}
    clients = {count: {"gain": [of], "later": [to]} for count, (of, to) in ratios.items()}
    poor = {count: {"gain": [0.1], "later": [9.0]} for count in ratios}  # of unequal answers: not judged
    return [
        {"shape": "small", "lengths": EQUAL, "clients": clients},
        {"shape": "small", "lengths": UNEQUAL, "clients": poor},
    ]


@pytest.mark.parametrize(
    ("gain", "alone", "later", "failed"),
    [(3.1, 0.96, 1.04, 0), (2.9, 0.96, 1.04, 1), (3.1, 0.9, 1.04, 1), (3.1, 0.96, 1.2, 2)],
)
def test_sixteen_clients_have_to_gain_one_may_not_lose_and_nobody_may_wait_longer(
    gain: float, alone: float, later: float, failed: int
) -> None:
    from benchmarks.serving_requests import verdicts

    assert sum(not verdict.passed for verdict in verdicts(result(gain, alone, later))) == failed


@pytest.mark.slow
def test_a_quick_run_answers_everybody_with_batches_and_without(tmp_path: Path) -> None:
    (found,) = quick_run("serving", tmp_path, "--clients")["results"]
    assert set(found["clients"]) == {"1", "4", "16"}
    for of in found["clients"].values():
        assert all(each["rate"] > 0 and each["first"] > 0 for batch in (1, 8) for each in of[f"batch {batch}"])
