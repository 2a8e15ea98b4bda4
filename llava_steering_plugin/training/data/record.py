"""Record in checkpoints on what data a training is and how it divides it, and say what has changed when it resumes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState

from llava_steering_plugin.errors import listing
from llava_steering_plugin.training.saving import integrity, notes

logger = logging.getLogger(__name__)

# Keys of the record in a checkpoint's notes.
DATA, SAMPLES, CONTENT, BATCH, ACCUMULATION = "data", "samples", "content", "batch_size", "accumulation"
# By them, transformers and LLaVA call what is recorded.
_FLAGS = {BATCH: "per_device_train_batch_size", ACCUMULATION: "gradient_accumulation_steps"}


class DataRecord:
    """Tells what the data of a training are.

    Args:
        dataset: the training's samples.
        args: the arguments of the training.
    """

    def __init__(self, dataset: Any, args: Any):
        self.dataset, self.args = dataset, args
        self._content: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the record."""
        return {
            SAMPLES: len(self.dataset),
            CONTENT: self.content(),
            BATCH: self.args.per_device_train_batch_size,
            ACCUMULATION: self.args.gradient_accumulation_steps,
        }

    def content(self) -> str | None:
        """Return a digest of all entries of the data file in their order; None where the dataset has no such list."""
        entries = getattr(self.dataset, "list_data_dict", None)
        if self._content is None and entries is not None:
            digest = hashlib.blake2b(digest_size=16)
            for entry in entries:
                digest.update(json.dumps(entry, sort_keys=True, default=repr).encode("utf-8", "surrogatepass"))
            self._content = digest.hexdigest()
        return self._content

    def warn_of_changes(self, checkpoint: Path, epoch_after: Callable[[int], float]) -> None:
        """Say what of the data is not as it was when a checkpoint was written.

        Args:
            checkpoint: to resume from.
            epoch_after: the epoch that the training reaches with a step, as it is now.
        """
        before = notes.read(checkpoint).get(DATA)
        changes = self._changes(before) if isinstance(before, dict) else _unlike_its_epoch(checkpoint, epoch_after)
        if changes:
            logger.warning(
                listing(
                    f"the data or its batches have changed since {checkpoint} was written. The training goes on at the "
                    "same step, and the end is not that of a training without the change: some samples may come twice "
                    "in this epoch, or not at all. For a new training on the data from these weights, give another "
                    "--output_dir, and this folder as --adapter_path",
                    changes,
                )
            )

    def _changes(self, before: dict[str, Any]) -> list[str]:
        now = self.as_json()
        found = []
        if before.get(SAMPLES) != now[SAMPLES]:
            found.append(f"it had {before.get(SAMPLES)} samples and has {now[SAMPLES]}")
        elif before.get(CONTENT) != now[CONTENT]:
            found.append(f"it has {now[SAMPLES]} samples as before, and not the same ones in the same order")
        for key, flag in _FLAGS.items():
            if before.get(key) != now[key]:
                kept = "; transformers keeps what it was" if key == BATCH else ""
                found.append(f"--{flag} is {now[key]} and was {before.get(key)}{kept}")
        return found


def _unlike_its_epoch(checkpoint: Path, epoch_after: Callable[[int], float]) -> list[str]:
    """Return what the state of a checkpoint without a record tells: earlier versions wrote none."""
    state = TrainerState.load_from_json(str(checkpoint / integrity.STATE))
    epoch = epoch_after(state.global_step)
    if state.epoch is None or abs(state.epoch - epoch) < 1e-6:
        return []
    return [f"step {state.global_step} was at epoch {state.epoch:.2f}, and would be at {epoch:.2f} now"]
