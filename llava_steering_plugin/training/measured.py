"""Measure what a training costs, beside what the frozen model costs on the same batch: `launch --measure FILE`."""

from __future__ import annotations

import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from llava_steering_plugin.adapters.attachment import disable_adapter
from llava_steering_plugin.adapters.parts.image_parts import image_parameters
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.training.beside import evaluating, model_to_evaluate, random_states_kept
from llava_steering_plugin.training.data.samples import take_marks
from llava_steering_plugin.whole_files import write_whole

logger = logging.getLogger(__name__)
# Where the trainings of this process write what they measure; None: nothing is.
MEASURE: ContextVar[Path | None] = ContextVar("llava_steering_measure", default=None)
# Steps that are not timed: caches fill, and memory is allocated for the first time.
WARM_UP = 2
PASSES = 3  # of the frozen model; the median counts
# A training that has diverged stays so. One batch without targets has no number for a loss either, and is harmless.
HOPELESS = 10
EVERY_SECONDS = 10.0


class Measured(TrainerCallback):
    """Writes losses, times, memory and the number of parameters; ends a training whose loss is no number any more.

    The file is JSON, and whole whenever it is read:

        trained_parameters, projector_parameters: of them, those between vision tower and decoder are in the second
        losses: [step, loss] as logged, null where it is no finite number
        step_seconds: median of the steps of this process; null before there are any
        frozen_seconds: of a forward pass of the frozen model, over the samples of a step
        peak_bytes: of the GPU, or without one of the process
        finished: the training has come to its end

    Args:
        trainer: whose training it is.
    """

    def __init__(self, trainer: Any, file: Path):
        self.trainer, self.file = trainer, file
        self.writes = trainer.args.process_index == 0
        self._steps: list[float] = []
        self._begun = self._written = 0.0
        self._earlier = _read(file)  # of a process that was killed
        self._frozen: float | None = self._earlier.get("frozen_seconds")
        self._hopeless = 0
        self._write([], finished=bool(self._earlier.get("finished")))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._frozen = self._time_frozen(args)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps.append(_now() - self._begun)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        finite = math.isfinite(logs["loss"])
        self._hopeless = 0 if finite else self._hopeless + 1
        if self._hopeless >= HOPELESS:
            logger.warning("the last %d losses are no numbers: this training has diverged, and ends here.", HOPELESS)
            control.should_training_stop = True
        if not finite or time.monotonic() - self._written > EVERY_SECONDS:
            self._write(state.log_history)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(state.log_history, finished=state.global_step >= state.max_steps)

    def _write(self, history: list[dict[str, Any]], finished: bool = False) -> None:
        if not self.writes:
            return
        self._written = time.monotonic()
        timed = self._steps[WARM_UP:] or self._steps
        projector = {id(each) for each in image_parameters(self.trainer.model).values()}
        counts = [0, 0]
        for parameter in self.trainer.model.parameters():
            if parameter.requires_grad:
                # ZeRO-3 leaves nothing in the parameter itself.
                counts[id(parameter) in projector] += int(getattr(parameter, "ds_numel", parameter.numel()))
        found = {
            "trained_parameters": counts[0],
            "projector_parameters": counts[1],
            "losses": losses_of(history) or self._earlier.get("losses", []),
            "eval_loss": next((each["eval_loss"] for each in reversed(history) if "eval_loss" in each), None),
            "step_seconds": statistics.median(timed) if timed else self._earlier.get("step_seconds"),
            "frozen_seconds": self._frozen,
            "peak_bytes": max(_peak_bytes(), int(self._earlier.get("peak_bytes") or 0)),
            "finished": finished,
        }
        write_whole(self.file, json.dumps(found) + "\n")

    def _time_frozen(self, args: Any) -> float | None:
        """Return the time of a forward pass without the adapter and without gradients, over the samples of a step."""
        data, trainer = self.trainer.train_dataset, self.trainer
        try:
            with random_states_kept(), torch.no_grad(), evaluating(model_to_evaluate(trainer)) as model:
                with _without_adapter(trainer):
                    return self._median_pass(model, data, args)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, OSError, SteeringError) as error:
            # A figure is missing; that must not cost the training.
            logger.warning("the frozen model was not timed: %s: %s", type(error).__name__, error)
            return None

    def _median_pass(self, model: Any, data: Any, args: Any) -> float:
        rows = [data[place % len(data)] for place in range(args.train_batch_size)]
        batch = self.trainer.data_collator(rows)
        take_marks(batch, set())
        inputs = self.trainer._prepare_inputs(batch)
        times = []
        for _ in range(PASSES + 1):
            begun = _now()
            with self.trainer.compute_loss_context_manager():
                model(**inputs)
            times.append(_now() - begun)
        return statistics.median(times[1:]) * args.gradient_accumulation_steps


def losses_of(history: list[dict[str, Any]]) -> list[list[Any]]:
    """Return [step, loss] of a training's log; the loss is None where it is no finite number."""
    return [
        [entry["step"], entry["loss"] if math.isfinite(entry["loss"]) else None]
        for entry in history
        if isinstance(entry.get("loss"), int | float)
    ]


def measure(trainer: Any) -> None:
    """Add the callback to a trainer, where `launch --measure` asks for it."""
    if (file := MEASURE.get()) is not None:
        trainer.add_callback(Measured(trainer, file))


@contextmanager
def _without_adapter(trainer: Any) -> Iterator[None]:
    model: nn.Module = trainer.model
    off = getattr(model, "disable_adapter", None)  # PEFT's
    with disable_adapter(model) if trainer._attachment is not None else off() if callable(off) else nullcontext():
        yield


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_bytes() -> int:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
