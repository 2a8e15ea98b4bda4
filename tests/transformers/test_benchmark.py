"""The benchmark of transformers' own Llava: it times real steps, of variants that differ in what they should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quick_runs import quick_run

JUDGED = {"MoReS rank 1, 1% of the tokens", "MoReS rank 4, all of the tokens"}


def test_a_step_trains_the_adapter_alone_and_a_decode_step_is_that_of_generate_and_leaves_the_cache() -> None:
    from benchmarks.own_classes import SETTINGS
    from benchmarks.own_classes_variants import LORA, variants
    from benchmarks.shared.beside_frozen import CONTROL, FROZEN
    from benchmarks.shared.frozen_llama import Case

    case = Case(32, 48, 4, layers=2, batch=1, visual=16, text=6)
    made = variants(case, SETTINGS, torch.float32)
    assert list(made) == [FROZEN, "MoReS rank 1, 1% of the tokens", CONTROL, "MoReS rank 4, all of the tokens", LORA]
    weights = {id(parameter): parameter for parameter in made[FROZEN].model.parameters()}
    base = {key: weight.clone() for key, weight in weights.items()}
    for name, variant in made.items():
        own = [parameter for parameter in variant.model.parameters() if id(parameter) not in weights]
        assert bool(own) is (name not in (FROZEN, CONTROL))
        before = [parameter.clone() for parameter in own]
        variant.train()
        assert all(not torch.equal(old, new) for old, new in zip(before, own, strict=True))
        assert all(parameter.grad is None for parameter in variant.model.parameters())

        length = variant.cache.get_seq_length()
        assert length == case.positions
        variant.decode()
        assert variant.cache.get_seq_length() == length
        # The first new token of `generate`, fed to a decode step, gives the second one.
        for parameter, old in zip(own, before, strict=True):
            parameter.data.copy_(old)  # the cache is of the untrained adapter
        answer = variant.model.generate(**variant.batch, max_new_tokens=2, min_new_tokens=2, do_sample=False)[0, -2:]
        logits = variant.next_logits(answer[:1][None])
        assert int(logits.argmax()) == int(answer[1])
    assert all(torch.equal(weight, base[key]) for key, weight in weights.items())


def test_only_mores_is_judged_by_its_median_and_in_quick_runs_only_if_it_is_certainly_too_slow() -> None:
    from benchmarks.own_classes import failures

    for excess, lowest, full, quick in ((0.02, 0.01, 0, 0), (0.04, 0.01, 1, 0), (0.05, 0.04, 1, 1)):
        times = {"decode step": {name: {"excess": excess, "interval": [lowest, 0.06]} for name in ("MoReS", "LoRA")}}
        results = [{"case": {"width": 64}, "times": times, "judged": ["MoReS"]}]
        assert len(failures(results, quick=False)) == full
        assert len(failures(results, quick=True)) == quick


@pytest.mark.slow
def test_a_quick_run_writes_every_time_and_ratio(tmp_path: Path) -> None:
    written = quick_run("transformers", tmp_path)
    assert {"transformers", "peft", "limit"} <= written["machine"].keys()
    (found,) = written["results"]
    assert set(found["judged"]) == JUDGED
    assert found["times"].keys() == {"training step", "decode step"}
    for of in found["times"].values():
        assert of.keys() == {
            "frozen", "control (frozen again)", "mean of these two", "PEFT LoRA rank 8, all linears", *JUDGED
        }  # fmt: skip
        for timing in of.values():
            assert 0 < timing["seconds_low"] <= timing["seconds"] <= timing["seconds_high"]
