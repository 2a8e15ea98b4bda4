"""The benchmark of serving: how it judges is right, and --quick writes what it measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from quick_runs import quick_run


def measured(excess: float, lowest: float, switch: float) -> list[dict[str, Any]]:
    from benchmarks.serving import DECODE, SPREAD

    names = ("base", "control (base again)", "MoReS, 1,000 resident", "MixLoRA, 10 resident", "PEFT LoRA, 10 resident")
    timing = {"excess": excess, "interval": (lowest, 2 * excess)}
    adapters = {name: {"switch seconds": switch} for name in names[2:]}
    passes = {DECODE: {SPREAD: 0.04, "variants": dict.fromkeys(names, timing)}}
    return [{"case": {"width": 64}, "passes": passes, "adapters": adapters}]


@pytest.mark.parametrize(
    ("excess", "lowest", "switch", "full", "quick"),
    [
        (0.03, 0.02, 1e-5, 0, 0),
        (0.05, 0.03, 1e-5, 1, 0),  # beyond the spread, but a short run cannot tell
        (0.09, 0.05, 1e-5, 1, 1),
        (0.03, 0.02, 2e-3, 2, 2),  # both of a pool's kinds; PEFT's own switch is not judged
    ],
)
def test_decode_steps_with_mores_are_judged_by_the_spread_and_choosing_by_a_millisecond(
    excess: float, lowest: float, switch: float, full: int, quick: int
) -> None:
    from benchmarks.serving import failures

    results = measured(excess, lowest, switch)
    assert len(failures(results, quick=False)) == full
    assert len(failures(results, quick=True)) == quick


def test_the_spread_is_what_the_control_differs_from_the_base_in_most_turns_either_way() -> None:
    from benchmarks.serving import BASE, CONTROL, spread

    control = [1.0, 0.98, 1.02, 0.96, 1.06]
    assert spread({BASE: [1.0] * 5, CONTROL: control}) == pytest.approx(0.04)


@pytest.mark.slow
def test_a_quick_run_writes_every_time_and_what_adapters_take(tmp_path: Path) -> None:
    written = quick_run("serving", tmp_path)
    (found,) = written["results"]
    adapters = {f"{kind} resident" for kind in ("MoReS, 1", "MoReS, 100", "MixLoRA, 1", "MixLoRA, 10")}
    adapters |= {"PEFT LoRA, 1 resident", "PEFT LoRA, 10 resident"}
    assert found["adapters"].keys() == adapters
    # 2 layers of width 256: R and M of rank 1, and an offset each, in float32.
    assert {found["adapters"][f"MoReS, {count} resident"]["bytes each"] for count in (1, 100)} == {
        2 * (2 * 256 + 1) * 4
    }
    assert all(kept["switch seconds"] > 0 for kept in found["adapters"].values())
    assert len(written["batches"]["variants"]) == 6
    for of in found["passes"].values():
        assert of["variants"].keys() >= {"base", "control (base again)", *adapters}
        assert of["spread of the control"] >= 0
        for timing in of["variants"].values():
            assert 0 < timing["seconds_low"] <= timing["seconds"] <= timing["seconds_high"]
