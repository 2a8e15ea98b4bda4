"""The benchmark of MoReS: what it counts is exact, how it judges is right, and --quick writes what it measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from quick_runs import quick_run


@pytest.mark.parametrize("batch", [1, 2])
def test_flops_parameters_and_buffers_are_what_the_formulas_say_for_every_rank_and_selection(batch: int) -> None:
    import torch

    from benchmarks.mores_variants import expected, flops_of, size, squares_of, variants
    from benchmarks.shared.beside_frozen import FROZEN
    from benchmarks.shared.frozen_llama import Case
    from llava_steering_plugin.modes.mores import MoReS

    case = Case(64, 96, 4, layers=3, batch=batch, visual=150, text=10)
    settings = tuple(MoReS(rank=rank, tokens=tokens) for rank in (1, 2, 4) for tokens in ("1%", "all"))
    made = variants(case, settings, torch.float32)
    flops, squares = flops_of(made[FROZEN]), squares_of(made[FROZEN])

    steered = [variant for variant in made.values() if variant.attachment is not None]
    assert len(steered) == len(settings)
    for variant in steered:
        assert size(variant, variant.attachment, flops, squares) == expected(case, variant.mode)


def test_an_adapter_fails_by_its_median_and_in_quick_runs_only_if_it_is_certainly_too_slow() -> None:
    from benchmarks.mores import failures

    counts = {"counted": {}, "formula": {}, "equal": True}
    for excess, lowest, full, quick in ((0.02, 0.01, 0, 0), (0.04, 0.01, 1, 0), (0.05, 0.04, 1, 1)):
        times = {"forward": {"rank 1": {"excess": excess, "interval": [lowest, 0.06]}}}
        results = [{"case": {"width": 64}, "times": times, "sizes": {"rank 1": counts}}]

        assert len(failures(results, quick=False)) == full
        assert len(failures(results, quick=True)) == quick


@pytest.mark.slow
def test_a_quick_run_writes_every_time_ratio_and_count(tmp_path: Path) -> None:
    written = quick_run("mores", tmp_path)
    assert [found["case"]["width"] for found in written["results"]] == [1024, 4096]
    for found in written["results"]:
        assert found["times"].keys() == {"forward", "forward + backward", "decode step"}
        for of in found["times"].values():
            assert of.keys() >= {"frozen", "control (frozen again)", *found["sizes"]}
            for timing in of.values():
                assert 0 < timing["seconds_low"] <= timing["seconds"] <= timing["seconds_high"]
        for counts in found["sizes"].values():
            assert counts["equal"] and counts["counted"]["buffers"] == counts["counted"]["square_tensors"] == 0
            assert counts["counted"]["decode_flops"] == 0
