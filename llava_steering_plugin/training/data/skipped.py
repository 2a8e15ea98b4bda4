"""Keep account of the bad samples that a training has skipped, and list them at its end."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch import distributed
from transformers import TrainerCallback

from llava_steering_plugin.errors import listing
from llava_steering_plugin.training.data.samples import NumberedDataset
from llava_steering_plugin.whole_files import write_whole

logger = logging.getLogger(__name__)

LIST = "skipped_samples.json"
NAMED = 20  # in the log; the file has all


class SkippedSamples(TrainerCallback):
    """Writes the list of skipped samples into the output folder with every checkpoint, and to the log at the end.

    A resumed training goes on with the list of the run that it resumes: the steps after the checkpoint come again, and
    with them the samples that were skipped there.

    Args:
        dataset: checks samples, and names them.
        folder: the output folder.
        numbers: of the samples that this rank has skipped; the training step adds to it.
    """

    def __init__(self, dataset: NumberedDataset, folder: Path, numbers: set[int]):
        self.dataset, self.file, self.numbers = dataset, folder / LIST, numbers
        self._entries: dict[int, dict[str, Any]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            self.numbers |= self._written()
        elif args.process_index == 0:
            self.file.unlink(missing_ok=True)  # of an earlier training in the same folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(args.process_index == 0)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = self._write(args.process_index == 0)
        if found and args.process_index == 0:
            lines = [f"{entry['name']}: {'; '.join(entry['reasons'])}" for entry in found[:NAMED]]
            if len(found) > NAMED:
                lines.append(f"... and {len(found) - NAMED} more; all are in {self.file}")
            path = "" if self.dataset.source is None else f" of {self.dataset.source.path}"
            headline = f"{len(found)} of {len(self.dataset)} samples{path} were skipped, and others took their places"
            logger.warning(listing(headline, lines))

    def _written(self) -> set[int]:
        try:
            found = {entry["index"] for entry in json.loads(self.file.read_text(encoding="utf-8"))}
            return {number for number in found if number < len(self.dataset)}
        except (OSError, ValueError, LookupError, TypeError):
            return set()  # none was skipped

    def _write(self, writes: bool) -> list[dict[str, Any]]:
        """Write the list of all ranks if there is one, and return it; every rank calls this."""
        self.numbers |= _of_all_ranks(self.numbers)
        if not (writes and self.numbers):
            return []
        for number in self.numbers - self._entries.keys():
            self._entries[number] = self._entry(number)
        entries = [self._entries[number] for number in sorted(self.numbers)]
        try:
            write_whole(self.file, json.dumps(entries, indent=1) + "\n")
        except OSError as error:
            logger.warning("the list of skipped samples cannot be written to %s: %s", self.file, error.strerror)
        return entries

    def _entry(self, number: int) -> dict[str, Any]:
        sample = self.dataset.dataset.list_data_dict[number]
        reasons = [defect.reason for defect in self.dataset.why_bad(number)]
        return {
            "index": number,
            "id": sample.get("id") if isinstance(sample, dict) else None,
            "name": self.dataset.name_of(number),
            "reasons": reasons or ["it could not be read when it was its turn, and can be now"],
        }


def _of_all_ranks(numbers: set[int]) -> set[int]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return numbers
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, numbers)
    return set().union(*gathered)
