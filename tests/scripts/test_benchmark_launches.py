"""The benchmark of launches: it counts exactly, and no pass of an adapter launches more than its bound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quick_runs import SCRIPTS  # noqa: F401 - puts `benchmarks` on the path of this process
from torch import nn

from benchmarks.launches_variants import BACKWARD, DECODE, FORWARD, PREFILL, frozen, linears_of, with_lora
from benchmarks.shared.launches import Launches


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


def test_the_command_writes_every_pass_of_every_way_to_put_an_adapter_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.launches import run

    assert run(("mores",), tmp_path / "launches.json") == 0
    rows = json.loads((tmp_path / "launches.json").read_text())["rows"]
    assert list(rows) == ["frozen, a layer", "mores", "mores, pool of 1", "mores, pool of 3", "PEFT LoRA"]
    assert len(rows["mores"]) == 8 and rows["mores, pool of 3"].keys() == {PREFILL, DECODE}
    assert "backward, reentrant checkpointing" in capsys.readouterr().out
