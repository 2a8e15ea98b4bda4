"""The benchmark of --steering_diagnostics_steps: it measures the positions that a training would, and judges shares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quick_runs import quick_run


def test_the_positions_are_those_that_the_splice_makes(patched_llava: Path) -> None:
    from benchmarks.diagnostics import _inputs, _kinds
    from benchmarks.gpu_sizes import TINY
    from benchmarks.shared.random_llava import build
    from llava_steering_plugin.hooks.token_map import spliced
    from llava_steering_plugin.measures.modality import kinds_in_training

    model = build(TINY, torch.device("cpu"), 16).float()
    inputs = {name: value[:1] for name, value in _inputs(TINY).items()}
    splice = model.prepare_inputs_labels_for_multimodal
    result, tokens = spliced(splice, position_ids=None, past_key_values=None, **inputs)
    assert tokens is not None
    assert torch.equal(kinds_in_training(tokens, result[5], torch.tensor([True])), _kinds(TINY))


@pytest.mark.slow
def test_a_quick_run_judges_the_share_of_a_pass_in_a_hundred_steps(tmp_path: Path) -> None:
    written = quick_run("diagnostics", tmp_path)
    assert [(row["variant"], row["batch"]) for row in written["rows"]] == [
        (variant, batch) for variant in ("MoReS r=1, 1%", "MixLoRA E=16, r=4") for batch in (1, 4)
    ]
    for row in written["rows"]:
        assert row["share"] == pytest.approx(1 / row["step"]["ratio"] / 100)
    judged = [row["share"] for row in written["rows"]]
    assert [verdict["measured"] for verdict in written["verdicts"]] == judged
    assert written["passed"] == all(share <= 0.02 for share in judged)
