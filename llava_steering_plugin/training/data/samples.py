"""Number and check the samples of a batch, so that messages can name them, and fix their order for each epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.data import Dataset, Sampler

from llava_steering_plugin.errors import DataError
from llava_steering_plugin.training.data.sample_checks import Defect, name_of
from llava_steering_plugin.training.data.source import (
    SOURCE,
    DataSource,
    failure,
    refusal,
    refuse_bad_entries,
    with_sound_entries,
)
from llava_steering_plugin.training.data.stand_ins import StandIns

# Keys of a batch, from the data loader to the training step. Each holds numbers of samples: those that are in it, and
# the bad ones whose places some of them take. The third holds a message: a bad sample that is not skipped.
SAMPLE_NUMBERS, SKIPPED, REFUSED = "steering_samples", "steering_skipped", "steering_refused"

# The message of ranks that end because another one has met a bad sample.
ELSEWHERE = "another rank has met a bad sample, which its own message names."

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
    """Adds its number to each sample of a dataset, and checks it; everything else is the wrapped dataset's.

    A bad sample ends nothing here, because here is a worker process of the data loader, whose errors reach the training
    as text with a traceback in it. The sample becomes a message, or another one takes its place.

    Args:
        dataset: LLaVA's, with the `source` that its constructor noted, if that is known.
        skip_seed: seed that chooses what takes the place of a bad sample; None: a bad sample is an error.
    """

    def __init__(self, dataset: Any, skip_seed: int | None = None):
        self.dataset = dataset
        self.source: DataSource | None = getattr(dataset, SOURCE, None)
        self.stand_ins = None if skip_seed is None else StandIns(skip_seed, getattr(dataset, "list_data_dict", dataset))

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        read = self._read(number)
        if isinstance(read, dict):
            return {**read, SAMPLE_NUMBERS: number}
        if self.stand_ins is None:
            return _refused(self._describe(number, read))
        for other in self.stand_ins.of(number):
            instead = self._read(other)
            if isinstance(instead, dict):
                return {**instead, SAMPLE_NUMBERS: other, SKIPPED: number}
        return _refused(f"none of the {len(self)} samples can be trained on. {self._describe(number, read)}")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # Worker processes unpickle the object before it has attributes; looking up "dataset" must not call itself then.
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    @property
    def modality_lengths(self) -> list[int]:
        """Return the lengths by which LLaVA groups samples; a sample whose length cannot be told counts one word."""
        return list(with_sound_entries(self.dataset).modality_lengths)

    @property
    def lengths(self) -> list[int]:
        """Return the lengths of the samples; a sample whose length cannot be told counts one word."""
        return list(with_sound_entries(self.dataset).lengths)

    def why_bad(self, number: int) -> list[Defect]:
        """Return why LLaVA cannot be trained on a sample; nothing if it can."""
        read = self._read(number)
        return read if isinstance(read, list) else []

    def _read(self, number: int) -> dict[str, Any] | list[Defect]:
        """Return what LLaVA makes of a sample, or why it cannot."""
        if found := self._defects(number, whole=False):
            return found
        try:
            return self._made_by_llava(number)
        except DataError as error:
            return self._defects(number, whole=True) or [Defect("other", str(error))]

    def _made_by_llava(self, number: int) -> dict[str, Any]:
        try:
            return dict(self.dataset[number])
        except Exception as error:  # its tokenizer and its image processor raise all kinds of errors
            raise DataError(failure(error)) from error

    def _defects(self, number: int, *, whole: bool) -> list[Defect]:
        return [] if self.source is None else self.source.checks.of(self.dataset.list_data_dict[number], whole=whole)

    def _describe(self, number: int, defects: Sequence[Defect]) -> str:
        entries = getattr(self.dataset, "list_data_dict", None)
        return refusal(self.source, number, None if entries is None else entries[number], defects)

    def refuse_bad_entries(self) -> None:
        """Look at all entries of the data file, at no picture, unless bad samples are skipped.

        Raises:
            DataError: LLaVA cannot be trained on a sample. The message names the first one.
        """
        if self.source is not None and self.stand_ins is None:
            refuse_bad_entries(self.dataset.list_data_dict, self.source)

    def name_of(self, number: int) -> str:
        """Return how a user finds a sample in the data file: its position, and its id if it has one."""
        entries = getattr(self.dataset, "list_data_dict", None)
        return name_of(number, None if entries is None else entries[number])


class NumberedCollator:
    """Adds the numbers of the samples to the batch that the wrapped collator makes."""

    def __init__(self, collator: Callable[..., dict[str, Any]]):
        self.collator = collator

    def __call__(self, instances: list[dict[str, Any]]) -> dict[str, Any]:
        refused = [instance for instance in instances if REFUSED in instance]
        if refused:
            return refused[0]
        numbers = torch.tensor([instance.pop(SAMPLE_NUMBERS) for instance in instances])
        skipped = [instance.pop(SKIPPED) for instance in instances if SKIPPED in instance]
        marks = {SAMPLE_NUMBERS: numbers} | ({SKIPPED: torch.tensor(skipped)} if skipped else {})
        return {**self.collator(instances), **marks}


def take_marks(batch: dict[str, Any], skipped: set[int]) -> Tensor | None:
    """Take the numbers of its samples out of a batch, and return them; add those of skipped ones to `skipped`.

    Every rank calls this for each of its batches, so that all of them end when one has to: the others would wait for it
    in the middle of their steps.

    Raises:
        DataError: the batch, or that of another rank, holds a bad sample, and they are not skipped.
    """
    message = batch.get(REFUSED)
    if on_any_rank(message is not None):
        raise DataError(message or ELSEWHERE)
    if SKIPPED in batch:
        skipped.update(batch.pop(SKIPPED).tolist())
    return batch.pop(SAMPLE_NUMBERS, None)


def on_any_rank(flag: bool) -> bool:
    """Return whether `flag` is true on some rank; every rank calls it."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return flag
    on_gpu = distributed.get_backend() == "nccl"
    flags = torch.tensor(float(flag), device=torch.cuda.current_device() if on_gpu else "cpu")
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return bool(flags)


def _refused(message: str) -> dict[str, Any]:
    # transformers measures the `input_ids` of all samples for --group_by_length.
    return {REFUSED: message, "input_ids": []}


def checked_samples(dataset: Any, arguments: Any) -> NumberedDataset:
    """Return LLaVA's dataset with numbers and checks, after a look at all its entries.

    Args:
        arguments: of the training.

    Raises:
        DataError: LLaVA cannot be trained on a sample, and bad samples are not skipped.
    """
    samples = NumberedDataset(dataset, data_seed(arguments) if arguments.skip_bad_samples else None)
    samples.refuse_bad_entries()
    return samples


def data_seed(arguments: Any) -> int:
    """Return the seed of the order of the data, and of what takes the places of bad samples."""
    return int(arguments.seed if arguments.data_seed is None else arguments.data_seed)


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


def follow_epochs(loader: Any) -> None:
    """Let the training loop, which calls `loader.set_epoch` at the start of every epoch, set it on our sampler too."""
    sampler = sampler_of(loader)
    if sampler is None:
        return
    before = getattr(loader, "set_epoch", None)

    def set_epoch(epoch: int) -> None:
        sampler.set_epoch(epoch)
        if before is not None:
            before(epoch)

    loader.set_epoch = set_epoch


def sampler_of(loader: Any) -> EpochSeededSampler | None:
    """Return our sampler inside the data loader, which accelerate has rebuilt; None if there is none."""
    found = loader
    while found is not None and not isinstance(found, EpochSeededSampler):
        found = getattr(found, "batch_sampler", None) or getattr(found, "sampler", None)
    return found
