"""What the benchmarks share: intervals that assume nothing, and turns until a figure is decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count

import pytest


def test_the_interval_holds_the_middle_of_the_turns_and_all_of_them_where_they_are_few() -> None:
    from benchmarks.shared.timing import interval

    many = [turn / 1000 for turn in range(100)]
    assert interval(many[::-1]) == pytest.approx((0.040, 0.059))
    assert interval(many[:4]) == pytest.approx((0.0, 0.003))


def test_an_excess_is_over_the_mean_of_the_baseline_and_the_same_again_turn_by_turn() -> None:
    from benchmarks.shared.timing import excesses, with_reference

    samples = with_reference({"base": [1.0] * 2, "again": [1.0, 1.06], "slower": [1.1] * 2}, "base", "again")
    assert excesses(samples, "slower") == pytest.approx([0.1, 1.1 / 1.03 - 1])
    assert excesses(samples, "again") == pytest.approx([0.0, 1.06 / 1.03 - 1])


@pytest.mark.parametrize(
    ("values", "turns"),
    [
        ([0.01] * 100, 5),  # certainly below
        ([0.2] * 100, 5),  # certainly above: what fails is not given more time than what passes
        ([0.2, 0.01, 0.02, 0.03, 0.02] + [0.01] * 95, 10),
        ([0.0, 0.2] * 50, 50),  # never certain: until the time is up
    ],
)
def test_turns_go_on_until_every_figure_is_on_one_side_of_the_limit(
    values: list[float], turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.shared.timing import until_decided

    monkeypatch.setattr("gc.collect", lambda: 0)  # after every turn, of all that these tests have in memory
    calls = {"one": lambda: None}
    ticks = count()

    def judged(samples: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
        taken = len(samples["one"])
        # The time is up after fifty turns.
        return {"one": values[:taken]} if taken < 50 else {"one": [0.0]}

    samples = until_decided(calls, judged, limit=0.05, rounds=5, seconds=1e6, clock=lambda: float(next(ticks)))
    assert len(samples["one"]) == turns
