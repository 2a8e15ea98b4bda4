"""What takes the place of a bad sample is decided by (seed, sample)."""

from __future__ import annotations

from collections import Counter

from llava_steering_plugin.training.data.stand_ins import StandIns


def test_stand_ins_depend_on_seed_and_sample_and_are_all_other_samples_those_with_images_first() -> None:
    entries = [{"image": ""} if number % 3 else {} for number in range(30)]
    order = list(StandIns(1, entries).of(4))
    assert order == list(StandIns(1, entries).of(4))
    assert sorted(order) == [number for number in range(30) if number != 4]
    assert all("image" in entries[number] for number in order[:19])
    assert order != list(StandIns(2, entries).of(4))
    first = Counter(next(StandIns(seed, entries).of(4)) for seed in range(2000))
    assert len(first) == 19 and max(first.values()) < 3 * min(first.values())
    assert all("image" not in entries[number] for number in list(StandIns(1, entries).of(3))[:9])
    assert list(StandIns(1, [{}]).of(0)) == []
