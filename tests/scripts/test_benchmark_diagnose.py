"""The benchmark of diagnoses: how it judges is right, and --quick writes what it measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from quick_runs import quick_run


@pytest.mark.parametrize(
    ("excess", "peak", "many", "failed"),
    [
        (0.3, 1010.0, 1005.0, set()),
        (1.1, 1010.0, 1005.0, {"base: time of the same generation, times"}),
        (0.3, 1200.0, 1005.0, {"base: peak memory of the same generation, times"}),
        (0.3, 1010.0, 1100.0, {"peak memory of many questions to few, times"}),
    ],
)
def test_time_is_judged_by_twice_the_generation_and_memory_by_a_tenth_more_and_by_its_growth(
    excess: float, peak: float, many: float, failed: set[str]
) -> None:
    from benchmarks.diagnose import MEASURED, PLAIN, verdicts

    times = {"base": {MEASURED: {"excess": excess}}}
    judged = verdicts(times, {"base": {PLAIN: 1000.0, MEASURED: peak}}, {"few": 1000.0, "many": many})
    assert len(judged) == 3
    assert {verdict.what for verdict in judged if not verdict.passed} == failed


@pytest.mark.slow
def test_a_quick_run_writes_times_and_peaks_of_base_and_adapter(tmp_path: Path) -> None:
    written = quick_run("diagnose", tmp_path)
    assert written["times"].keys() == written["peaks"].keys() == {"base", "MoReS"}
    for variants in written["times"].values():
        assert variants.keys() == {"generation", "control (generation again)", "diagnose modality", "mean of these two"}
        assert all(0 < timing["seconds"] for timing in variants.values())
    assert all(peak > 100 for peaks in written["peaks"].values() for peak in peaks.values())
    assert len(written["verdicts"]) == 5
