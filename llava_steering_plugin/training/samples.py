"""Number the samples of a batch, so that warnings can name them, and fix the order of samples for each epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

# Key of a batch that holds the numbers of its samples, from the data loader to the training step.
SAMPLE_NUMBERS = "steering_samples"

# The rules that make one seed of a training's seed and an epoch. Their names stand in checkpoints: never rename one.
HASHED = "sha256(seed:epoch)"
SUMMED = "seed+epoch"  # of earlier versions: epoch 1 of seed 1 had the order of epoch 0 of seed 2
RULES: dict[str, Callable[[int, int], int]] = {
    HASHED: lambda seed, epoch: int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:8], "big"),
    SUMMED: lambda seed, epoch: seed + epoch,
}
# Trainings without a mode, which have the order of upstream's samplers, get the order that a mode has at their seed.
SAME_ORDER: ContextVar[bool] = ContextVar("llava_steering_same_order", default=False)


class NumberedDataset(Dataset[dict[str, Any]]):
    """Adds its number to each sample of a dataset; everything else is the wrapped dataset's."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.dataset[number], SAMPLE_NUMBERS: number}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # Worker processes unpickle the object before it has attributes; looking up "dataset" must not call itself then.
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def name_of(self, number: int) -> str:
        """Return how a user finds a sample in the data file: its position, and its id if it has one."""
        entries = getattr(self.dataset, "list_data_dict", None)
        identity = entries[number].get("id") if entries is not None else None
        return f"sample {number}" + (f" (id {identity!r})" if identity is not None else "")


class NumberedCollator:
    """Adds the numbers of the samples to the batch that the wrapped collator makes."""

    def __init__(self, collator: Callable[..., dict[str, Any]]):
        self.collator = collator

    def __call__(self, instances: list[dict[str, Any]]) -> dict[str, Any]:
        numbers = torch.tensor([instance.pop(SAMPLE_NUMBERS) for instance in instances])
        return {**self.collator(instances), SAMPLE_NUMBERS: numbers}


class EpochSeededSampler(Sampler[int]):
    """Orders an epoch with the wrapped sampler, from a generator that depends on (seed, epoch) alone.

    LLaVA's samplers draw from the global generator, whose state at the start of an epoch differs in a resumed run: from
    the second epoch on, it would see other batches than the run that it resumes.

    Args:
        sampler: draws from torch's global generator.
        seed: of the training.
        rule: the name of a rule in `RULES`.
    """

    def __init__(self, sampler: Any, seed: int, rule: str = HASHED):
        self.sampler, self.seed, self.rule, self.epoch = sampler, seed, rule, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration orders."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RULES[self.rule](self.seed, self.epoch))
            order = list(self.sampler)
        return iter(order)

    def __len__(self) -> int:
        return len(self.sampler)


def sampler_of(loader: Any) -> EpochSeededSampler | None:
    """Return our sampler inside the data loader, which accelerate has rebuilt; None if there is none."""
    found = loader
    while found is not None and not isinstance(found, EpochSeededSampler):
        found = getattr(found, "batch_sampler", None) or getattr(found, "sampler", None)
    return found
