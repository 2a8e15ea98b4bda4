"""The benchmark of MixLoRA: its formula is exact, it judges beside the control, --quick writes what it measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from quick_runs import quick_run


@pytest.mark.parametrize(("batch", "positions"), [(1, 1), (1, 16), (3, 16)])
def test_floating_point_operations_are_what_the_formula_says(batch: int, positions: int) -> None:
    import torch

    from benchmarks.mixlora import LinearCase, expected_flops, flops

    case = LinearCase(64, 96, batch, positions)
    counted = flops(case, torch.float32)
    assert counted["mixlora"] - counted["frozen"] == expected_flops(case)
    assert counted["control"] == counted["frozen"] < counted["mixlora"] < counted["dense delta"]


def test_what_counts_is_the_time_beyond_what_the_frozen_layer_takes_twice() -> None:
    from benchmarks.mixlora import CONTROL, FROZEN, excess
    from benchmarks.shared.timing import REFERENCE, summarise, with_reference

    samples = {FROZEN: [1.0] * 5, CONTROL: [1.02] * 5, "mixlora": [1.0605] * 5}
    timings = summarise(with_reference(samples, FROZEN, CONTROL), baseline=REFERENCE)
    assert excess(timings) == pytest.approx(0.05)


@pytest.mark.slow
def test_a_quick_run_writes_every_time_count_and_peak(tmp_path: Path) -> None:
    written = quick_run("mixlora", tmp_path)

    kinds = {"frozen", "control", "mixlora", "peft", "dense delta"}
    assert [layer["case"]["positions"] for layer in written["layers"]] == [1, 128]
    for layer in written["layers"]:
        assert layer["flops"].keys() == kinds
        assert layer["times"].keys() == kinds | {"mean of these two"}
        assert layer["flops"]["mixlora"] - layer["flops"]["frozen"] == layer["formula"]
        for timing in layer["times"].values():
            assert 0 < timing["seconds_low"] <= timing["seconds"] <= timing["seconds_high"]
    for timings in (written["prefill"], written["decode"]):
        assert timings.keys() == layer["times"].keys() - {"dense delta"}
    for peaks in written["peak bytes"].values():
        assert peaks["frozen"] < peaks["mixlora"] < peaks["dense delta"]
    assert written["verdicts"]
