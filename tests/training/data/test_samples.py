"""Samples know their numbers, and seed and epoch alone make an epoch's order (`training/data/samples.py`)."""

from __future__ import annotations

import hashlib
import pickle
from typing import Any

import pytest
import torch
from torch.utils.data import RandomSampler

from llava_steering_plugin.training.data.samples import (
    HASHED,
    RULES,
    SAMPLE_NUMBERS,
    SUMMED,
    EpochSeededSampler,
    NumberedCollator,
    NumberedDataset,
)


class Data:
    """Three samples, with what LLaVA's dataset keeps of the data file."""

    list_data_dict = ({"id": "a"}, {"id": 7}, {})

    def __len__(self) -> int:
        return 3

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"ids": torch.tensor([number * 10])}


def test_a_batch_carries_the_numbers_of_its_samples_beside_what_the_collator_makes() -> None:
    dataset = NumberedDataset(Data())
    collate = NumberedCollator(lambda samples: {"ids": torch.stack([sample["ids"] for sample in samples])})
    batch = collate([dataset[2], dataset[0]])
    assert batch["ids"].tolist() == [[20], [0]]
    assert batch[SAMPLE_NUMBERS].tolist() == [2, 0]


def test_a_numbered_dataset_is_in_everything_else_the_one_it_wraps_also_in_another_process() -> None:
    dataset = pickle.loads(pickle.dumps(NumberedDataset(Data())))
    assert len(dataset) == 3 and dataset.list_data_dict is Data.list_data_dict
    with pytest.raises(AttributeError):
        dataset.missing  # noqa: B018


def test_a_sample_is_named_by_its_position_and_its_id() -> None:
    dataset = NumberedDataset(Data())
    assert [dataset.name_of(number) for number in range(3)] == ["sample 0 (id 'a')", "sample 1 (id 7)", "sample 2"]


def test_the_order_of_an_epoch_is_the_same_whatever_was_drawn_before_and_another_one_in_the_next() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSeededSampler(RandomSampler(range(50)), seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    first = order(3, 1)
    before = torch.get_rng_state()
    torch.rand(5)
    assert order(3, 1) == first
    torch.set_rng_state(before)
    assert sorted(first) == list(range(50))
    assert order(3, 2) != first and order(4, 1) != first


def test_no_two_of_many_pairs_of_seed_and_epoch_have_the_same_order() -> None:
    """Seeds that people take are neighbours: a sum of both gives seed 1 in its second epoch the order of seed 2."""
    pairs = [(seed, epoch) for seed in (0, 1, 2, 3, 7, 10, 11, 42, 100, 1337, 2**32 - 1) for epoch in range(30)]
    # torch's generator on the CPU takes the low 32 bits.
    assert len({RULES[HASHED](*pair) % 2**32 for pair in pairs}) == len(pairs)
    assert RULES[SUMMED](1, 1) == RULES[SUMMED](2, 0)


def test_the_rules_are_what_their_names_say_and_stay_what_they_are() -> None:
    """Their names stand in checkpoints: another value here would change the batches of a resumed training."""
    expected = int(hashlib.sha256(b"42:3").hexdigest()[:16], 16)
    assert RULES == {"sha256(seed:epoch)": RULES[HASHED], "seed+epoch": RULES[SUMMED]}
    assert (RULES[HASHED](42, 3), RULES[SUMMED](42, 3)) == (expected, 45)
    assert expected == 0x9943B4BC886DC1E8


def test_ordering_an_epoch_leaves_the_global_generator_as_it_was() -> None:
    before = torch.get_rng_state()
    list(EpochSeededSampler(RandomSampler(range(50)), 3))
    assert torch.equal(torch.get_rng_state(), before)
