"""A problem made so that routing matters: learned routers against frozen ones, and LoRA of as many active factors.

scripts/benchmarks/balance.py defines the problem; docs/multitask.md has its table.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

SEEDS = range(5)
# Names in the benchmark's table.
BALANCED, LEARNED = "balance, 1 pass of 32 rows", "learned routers, no balance"
OVER_STEP = "balance over the step, 16 passes of 2 rows"


def errors_of(*names: str) -> dict[str, Sequence[float]]:
    from benchmarks.balance import WAYS, relative_error

    return {name: [relative_error(WAYS[name], seed) for seed in SEEDS] for name in names}


@pytest.mark.slow
def test_learned_routers_end_below_frozen_ones_and_these_below_lora() -> None:
    errors = errors_of(BALANCED, LEARNED, "frozen routers", "LoRA r=4", OVER_STEP)
    mean = {name: sum(found) / len(found) for name, found in errors.items()}
    assert mean[BALANCED] < 0.9 * mean["frozen routers"], errors
    assert mean[LEARNED] < mean["frozen routers"], errors
    assert mean["frozen routers"] < 0.95 * mean["LoRA r=4"], errors
    seeds = zip(errors[BALANCED], errors["frozen routers"], strict=True)
    assert sum(learned < frozen for learned, frozen in seeds) >= 4, errors
    # Rows that come two at a time are balanced too, because the balance is over the step.
    assert mean[OVER_STEP] < 0.97 * mean[LEARNED], errors
