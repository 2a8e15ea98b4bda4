"""Which samples are in a batch, and in which order they come: the two things upstream's data loading does not tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

# Key under which the numbers of a batch's samples travel from the data loader to the training step.
KEY = "steering_samples"


class NumberedDataset(Dataset[dict[str, Any]]):
    """A dataset whose samples know their number; in everything else the dataset it wraps."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.dataset[number], KEY: number}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # Worker processes unpickle the object before it has attributes; "dataset" must not look for itself then.
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def name_of(self, number: int) -> str:
        """How a user finds a sample in the data file: its place, and its id where it has one."""
        entries = getattr(self.dataset, "list_data_dict", None)
        identity = entries[number].get("id") if entries is not None else None
        return f"sample {number}" + (f" (id {identity!r})" if identity is not None else "")


class NumberedCollator:
    """A collator that passes the samples' numbers on beside the batch that the wrapped one makes."""

    def __init__(self, collator: Callable[..., dict[str, Any]]):
        self.collator = collator

    def __call__(self, instances: list[dict[str, Any]]) -> dict[str, Any]:
        numbers = torch.tensor([instance.pop(KEY) for instance in instances])
        return {**self.collator(instances), KEY: numbers}


class EpochSeededSampler(Sampler[int]):
    """Orders an epoch by (seed, epoch) alone, with the order that the wrapped sampler would make.

    Upstream's samplers draw from the global generator, whose state at an epoch's start is another one in a resumed run:
    from the second epoch on it would see other batches than the run it continues.
    """

    def __init__(self, sampler: Any, seed: int):
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + self.epoch)
            order = list(self.sampler)
        return iter(order)

    def __len__(self) -> int:
        return len(self.sampler)
