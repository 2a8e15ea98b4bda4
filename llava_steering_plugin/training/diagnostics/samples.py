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


def choose_samples(data: NumberedDataset, collator: Any, count: int, seed: int) -> list[ChosenSample]:
    """Return `count` samples, or as many as there are, in an order that the seed decides; those with an image first.

    A sample that cannot be read, or has no answer to learn, is passed over.
    """
    return list(islice(_readable(data, collator, islice(_order(data, seed), LOOKED_AT * count)), count))


def _order(data: NumberedDataset, seed: int) -> Iterator[int]:
    numbers = list(range(len(data)))
    random.Random(seed).shuffle(numbers)
    entries = getattr(data, "list_data_dict", None)
    if entries is None:
        yield from numbers
        return
    pictured = {number for number in numbers if isinstance(entries[number], dict) and "image" in entries[number]}
    yield from (number for number in numbers if number in pictured)
    yield from (number for number in numbers if number not in pictured)


def _readable(data: NumberedDataset, collator: Any, numbers: Iterator[int]) -> Iterator[ChosenSample]:
    for number in numbers:
        sample = data[number]
        if REFUSED in sample or SKIPPED in sample or bool((sample["labels"] == IGNORED).all()):
            continue
        batch = collator([sample])
        batch.pop(SAMPLE_NUMBERS)
        entries = getattr(data, "list_data_dict", None)
        yield ChosenSample(number, None if entries is None else entries[number].get("id"), batch)
