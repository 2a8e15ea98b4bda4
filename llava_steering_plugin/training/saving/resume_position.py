"""Let a resumed training go on at the batch, and with the random numbers, at which its checkpoint was written.

The loop of transformers 4.37 counts accumulated batches across the ends of epochs, so a step may begin in one epoch and
end in the next; yet it resumes as if every epoch held a whole number of steps. Where accumulation does not divide an
epoch, a resumed run would train on other batches, at another epoch, than the run that it resumes.
"""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from llava_steering_plugin.training.data.record import DataRecord
from llava_steering_plugin.training.saving import integrity

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Course:
    """Divides data into epochs and steps as transformers' loop does.

    Attributes:
        batches: how many an epoch has on every rank.
        accumulation: how many of them a step takes; not more than an epoch has.
    """

    batches: int
    accumulation: int

    def after(self, step: int) -> tuple[int, int]:
        """Return the epoch, from 0, and how many of its batches are done, at least one, at the end of a step from 1."""
        epoch, before = divmod(step * self.accumulation - 1, self.batches)
        return epoch, before + 1

    def epoch(self, step: int) -> float:
        """Return the epoch that transformers writes into logs and checkpoints at the end of a step."""
        epoch, batch = self.after(step)
        return epoch + batch / self.batches

    def length(self, args: Any) -> tuple[int, int]:
        """Return how many steps the training has, and the number of epochs that transformers keeps beside it."""
        steps = self.batches // self.accumulation
        if args.max_steps > 0:
            return args.max_steps, math.ceil(args.max_steps / steps)
        return math.ceil(args.num_train_epochs * steps), math.ceil(args.num_train_epochs)

    @property
    def is_even(self) -> bool:
        """Return whether every epoch ends with a step."""
        return self.batches % self.accumulation == 0


class RestOfTheData:
    """Yields the batches from a position on, epoch after epoch.

    It has no length: transformers' loop then counts no epochs and skips no batches of its own. All other attributes are
    the loader's.

    Args:
        loader: yields an epoch after `set_epoch`.
        epoch: to begin in, from 0.
        skipped: how many of its batches are left out.
        begun: called once the first batch has been read.
    """

    def __init__(self, loader: Any, epoch: int, skipped: int, begun: Callable[[], None]):
        self._loader, self._first, self._skipped, self._begun = loader, epoch, skipped, begun
        self._epoch = epoch

    def set_epoch(self, number: int) -> None:
        """Set the epoch to yield, counted from the first of this run."""
        self._epoch = self._first + number
        self._loader.set_epoch(self._epoch)

    def __iter__(self) -> Iterator[Any]:
        if self._epoch > self._first or not self._skipped:
            yield from self._loader
            return
        from accelerate import skip_first_batches

        for number, batch in enumerate(skip_first_batches(self._loader, self._skipped)):
            if number == 0:
                self._begun()
            yield batch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)


class ResumedEpochs(TrainerCallback):
    """Corrects the epochs that transformers' loop counts from the start of a resumed run.

    Args:
        course: of the training.
        epochs: how many transformers counts for the whole training.
    """

    def __init__(self, course: Course, epochs: int):
        self.course, self.epochs = course, epochs

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.num_train_epochs = self.epochs

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = self.course.epoch(state.global_step)


class RandomStates(TrainerCallback):
    """Keeps the random states of the last step, for a checkpoint at the end of an epoch that ends between two steps.

    A training that resumes from it begins behind that step.
    """

    def __init__(self) -> None:
        self._at_step: dict[str, Any] | None = None
        self._between = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at_step, self._between = None, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at_step, self._between = _random_states(), False

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._between = True

    @contextmanager
    def of_last_step(self) -> Iterator[None]:
        """Put the states of the last step in place for the block."""
        if not self._between or self._at_step is None:
            yield
            return
        now = _random_states()
        _set_random_states(self._at_step)
        try:
            yield
        finally:
            _set_random_states(now)


class ResumePositionMixin:
    """Finds the trainer's place in the data; without a tuning mode it passes every call on."""

    args: Any
    accelerator: Any
    train_dataset: Any
    _attachment: Any
    _course: Course
    _data: DataRecord
    _saved_step: int | None = None
    _states: RandomStates | None = None
    _rest: Callable[[Any], RestOfTheData] | None = None

    def _plan_course(self, checkpoint: Path | None) -> None:
        """Find out how epochs divide into steps, and say what of that has changed since a checkpoint.

        An epoch with fewer batches than are accumulated becomes one step. transformers would end a step there too, but
        go on counting, so that other steps end within epochs; ranks would not exchange gradients at the ends of epochs,
        and DeepSpeed would make no step there.

        Args:
            checkpoint: to resume from, whose batch size transformers keeps.
        """
        state = None if checkpoint is None else _state_of(checkpoint)
        batches = self._batches_of_an_epoch((state and state.train_batch_size) or self.args.train_batch_size)
        if self.args.gradient_accumulation_steps > batches > 0:
            if self.args.process_index == 0:
                logger.warning(
                    "--gradient_accumulation_steps is %d, and an epoch has %d batch(es) on each rank: %d are "
                    "accumulated, so that every epoch is one step.",
                    self.args.gradient_accumulation_steps,
                    batches,
                    batches,
                )
            self.args.gradient_accumulation_steps = self.accelerator.gradient_accumulation_steps = batches
        self._course = Course(max(batches, 1), min(self.args.gradient_accumulation_steps, max(batches, 1)))
        if not self._course.is_even and self._states is None:
            self._states = RandomStates()
            self.add_callback(self._states)  # type: ignore[attr-defined]
        self._data = DataRecord(self.train_dataset, self.args)
        if state is not None and checkpoint is not None:
            # With `--save_strategy epoch`, the rest of an epoch comes again up to where this checkpoint was written.
            self._saved_step = state.global_step
            if self.args.process_index == 0:
                self._data.warn_of_changes(checkpoint, self._course.epoch)

    def _batches_of_an_epoch(self, size: int) -> int:
        # accelerate divides batches among ranks; it does it here with numbers in place of samples.
        numbers: Any = range(len(self.train_dataset))
        loader: Any = DataLoader(numbers, batch_size=size, drop_last=self.args.dataloader_drop_last)
        return len(self.accelerator.prepare_data_loader(loader, device_placement=False))

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        loop = super()._inner_training_loop  # type: ignore[misc]
        if self._attachment is None or resume_from_checkpoint is None or batch_size is None:
            return loop(batch_size, args, resume_from_checkpoint, *rest, **kwargs)
        course = Course(self._batches_of_an_epoch(batch_size), self._course.accumulation)
        step = _state_of(Path(resume_from_checkpoint)).global_step
        epoch, skipped = course.after(step)
        if skipped == course.batches:
            epoch, skipped = epoch + 1, 0
        if args.ignore_data_skip:
            skipped = 0

        def read_random_states() -> None:
            self._load_rng_state(resume_from_checkpoint)  # type: ignore[attr-defined]

        self._rest = lambda loader: RestOfTheData(loader, epoch, skipped, read_random_states)
        steps, epochs = course.length(args)
        corrected = ResumedEpochs(course, epochs)
        # Before those that log at the end of a step.
        self.callback_handler.callbacks.insert(0, corrected)  # type: ignore[attr-defined]
        # Only the loop sees these: checkpoints keep the arguments of the user.
        seen = copy.copy(args)
        seen.max_steps, seen.ignore_data_skip = steps, True
        try:
            return loop(batch_size, seen, resume_from_checkpoint, *rest, **kwargs)
        finally:
            self._rest = None
            self.remove_callback(corrected)  # type: ignore[attr-defined]

    def _from_here(self, loader: Any) -> Any:
        """Return the training's batches from where it is."""
        return loader if self._rest is None else self._rest(loader)

    def _save_rng_state(self, output_dir: str) -> None:
        if self._states is None:
            super()._save_rng_state(output_dir)  # type: ignore[misc]
            return
        with self._states.of_last_step():
            super()._save_rng_state(output_dir)  # type: ignore[misc]


def _state_of(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / integrity.STATE))


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
