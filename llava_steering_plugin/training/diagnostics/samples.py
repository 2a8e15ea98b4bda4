"""Choose the few samples that a training is measured on: by the seed, the same in every pass and after a resume."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from llava_steering_plugin.hooks.token_map import IGNORED
from llava_steering_plugin.training.data.samples import REFUSED, SAMPLE_NUMBERS, SKIPPED, NumberedDataset

# So many samples are looked at for each that is wanted: where no picture can be read, not all of a large file.
LOOKED_AT = 20


@dataclass(frozen=True)
class ChosenSample:
    """Holds one sample as a batch of its own.

    Attributes:
        number: its position in the data file.
        id: its id there; None if it has none.
        batch: what the model takes, on the CPU.
    """

    number: int
    id: Any
    batch: dict[str, Any]


def as_loaded(trainer: Any, data: Any) -> tuple[Any, Any]:
    """Return data and collator as the trainer's own loader has them, without the columns that no model takes."""
    if isinstance(data, dict):  # several data sets to evaluate on
        data = next(iter(data.values()), None)
    collator = trainer.data_collator
    if isinstance(data, NumberedDataset) or data is None:
        return data, collator
    if hasattr(data, "column_names"):
        return trainer._remove_unused_columns(data), collator
    return data, trainer._get_collator_with_removed_columns(collator)


def choose_samples(data: Any, collator: Any, count: int, seed: int) -> list[ChosenSample]:
    """Return `count` samples, or as many as there are, in an order that the seed decides; those with an image first.

    A sample that cannot be read, or has no answer to learn, is passed over. Where the data are not LLaVA's, images are
    not looked for; data without a length have no samples to choose from.
    """
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        return []
    return list(islice(_readable(data, collator, islice(_order(data, seed), LOOKED_AT * count)), count))


def _order(data: Any, seed: int) -> Iterator[int]:
    numbers = list(range(len(data)))
    random.Random(seed).shuffle(numbers)
    entries = getattr(data, "list_data_dict", None)
    if entries is None:
        yield from numbers
        return
    pictured = {number for number in numbers if isinstance(entries[number], dict) and "image" in entries[number]}
    yield from (number for number in numbers if number in pictured)
    yield from (number for number in numbers if number not in pictured)


def _readable(data: Any, collator: Any, numbers: Iterator[int]) -> Iterator[ChosenSample]:
    entries = getattr(data, "list_data_dict", None)
    for number in numbers:
        sample = data[number]
        if REFUSED in sample or SKIPPED in sample:
            continue
        batch = dict(collator([sample]))
        if "labels" not in batch or bool((batch["labels"] == IGNORED).all()):
            continue
        batch.pop(SAMPLE_NUMBERS, None)
        yield ChosenSample(number, None if entries is None else entries[number].get("id"), batch)
