"""The benchmark of launches: it counts exactly, and no pass of an adapter launches more than its bound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quick_runs import SCRIPTS  # noqa: F401 - puts `benchmarks` on the path of this process
from torch import nn

from benchmarks.launches import counts_of
from benchmarks.launches_variants import BACKWARD, DECODE, FORWARD, PREFILL, frozen, linears_of, with_lora
from benchmarks.shared.launches import Launches
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS

# For each host: a layer for MoReS, a linear for MixLoRA. Counts are exact: a bound is what docs/benchmarks.md shows.
REPEATED = {
    f"{phase}{how}" for phase in (FORWARD, BACKWARD) for how in (", checkpointing", ", reentrant checkpointing")
}
BOUNDS = [
    (MoReS(), {PREFILL: 4.5, DECODE: 0.5, FORWARD: 7.0, BACKWARD: 11.0}, 16.0, {PREFILL: 22.25, DECODE: 0.5}),
    (MoReS(rank=4, modality="vis+text"), {PREFILL: 9.5, DECODE: 0.5, FORWARD: 12.0, BACKWARD: 22.0}, 32.0, {}),
    (
        MixLoRA(factors=8, rank=2),
        {PREFILL: 10.0, DECODE: 1.65, FORWARD: 10.0, BACKWARD: 11.25},
        21.2,
        {PREFILL: 38.2, DECODE: 12.9},
    ),
]


def test_views_and_allocations_are_not_counted_and_backward_passes_are() -> None:
    linear = nn.Linear(4, 4)
    hidden = torch.randn(3, 4, requires_grad=True)
    with Launches() as forward:
        torch.empty(3), hidden.view(12), hidden.T, hidden.detach(), hidden.expand(2, 3, 4)
        loss = linear(hidden).relu_().sum()
    assert forward.found == {"addmm": 1, "relu_": 1, "sum": 1} and forward.total == 3
    with Launches() as backward:
        loss.backward()
    # The gradients of input, weight and bias, of relu, and the 1 that a backward pass begins with.
    assert backward.found == {"ones_like": 1, "threshold_backward": 1, "mm": 2, "sum": 1}


def test_pefts_lora_adds_what_its_formula_says() -> None:
    """Two products, a factor and a sum; their gradients are four products, a factor and a sum."""
    ours, base = with_lora(), frozen()
    added = {phase: count - base.inference()[phase] for phase, count in ours.inference().items()}
    assert added == {PREFILL: 4 * linears_of(), DECODE: 4 * linears_of()}
    added = {phase: count - base.training()[phase] for phase, count in ours.training().items()}
    assert added == {FORWARD: 4 * linears_of(), BACKWARD: 6 * linears_of()}


@pytest.mark.parametrize(("mode", "bounds", "repeated", "in_a_pool"), BOUNDS, ids=["MoReS", "MoReS twice", "MixLoRA"])
def test_no_pass_launches_more_than_its_bound(
    mode: Mode, bounds: dict[str, float], repeated: float, in_a_pool: dict[str, float]
) -> None:
    """Whoever adds an operation to a layer or a linear sees it here, and decides whether it is worth its launch."""
    ours, pool, mixed = counts_of(mode).values()
    assert {phase: count for phase, count in ours.items() if phase in bounds and count > bounds[phase]} == {}
    assert REPEATED < ours.keys() and max(ours[phase] for phase in REPEATED) <= repeated, ours
    assert {phase: count for phase, count in pool.items() if count > bounds[phase]} == {}
    assert {phase: count for phase, count in mixed.items() if count > in_a_pool.get(phase, count)} == {}


def test_the_command_writes_every_pass_of_every_way_to_put_an_adapter_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.launches import run

    assert run(("mores",), tmp_path / "launches.json") == 0
    rows = json.loads((tmp_path / "launches.json").read_text())["rows"]
    assert list(rows) == ["frozen, a layer", "mores", "mores, pool of 1", "mores, pool of 3", "PEFT LoRA"]
    assert len(rows["mores"]) == 8 and rows["mores, pool of 3"].keys() == {PREFILL, DECODE}
    assert "backward, reentrant checkpointing" in capsys.readouterr().out
