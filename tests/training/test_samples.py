"""Samples know their numbers, and the order of an epoch depends on seed and epoch alone (`training/samples.py`)."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch.utils.data import RandomSampler

from llava_steering_plugin.training.samples import SAMPLE_NUMBERS, EpochSeededSampler, NumberedCollator, NumberedDataset


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


def test_ordering_an_epoch_leaves_the_global_generator_as_it_was() -> None:
    before = torch.get_rng_state()
    list(EpochSeededSampler(RandomSampler(range(50)), 3))
    assert torch.equal(torch.get_rng_state(), before)
