"""Handle SIGTERM, which preemptible machines send: all ranks save a checkpoint of the same step, and exit."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import RawValue
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

# What a shell reports for a process that SIGTERM ended. It tells a launcher that the training is not finished.
EXIT_STATUS = 128 + signal.SIGTERM


class Preemption(TrainerCallback):
    """Save a checkpoint at the end of the current step and end the training, once any rank has received SIGTERM."""

    def __init__(self) -> None:
        self.asked = False  # this rank has received SIGTERM
        self.agreed = False  # a rank has, and all ranks stop
        self._watching = RawValue("b", 0)  # in memory shared with the workers of the data loader

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Only note a SIGTERM inside the block; exit at its end if the ranks have stopped for one.

        Raises:
            SystemExit: the training was stopped. The same command continues from the checkpoint.
        """
        # Python allows handlers in its main thread only; a training in another thread ends as without us.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        self._watching.value = 1
        try:
            yield
        finally:
            self._watching.value = 0
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
        if self.agreed:
            raise SystemExit(EXIT_STATUS)
        if self.asked:
            # Other ranks need not know of it, and would wait for this rank in the last save if it exited now.
            logger.warning("SIGTERM came after the last step: the training is complete, and its result will be saved.")

    def _note(self, number: int, frame: object) -> None:
        # Nothing else, however often it comes: a scheduler signals all processes, and torchrun repeats the signal.
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.agreed = self._any_rank(args.device)
        if self.agreed:
            logger.warning("SIGTERM: saving checkpoint-%d in %s, then stopping.", state.global_step, args.output_dir)
            control.should_save = True
            control.should_training_stop = True
            self._put_evaluation_off(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agreed:
            self._put_evaluation_off(state, control)

    @staticmethod
    def _put_evaluation_off(state: Any, control: Any) -> None:
        """Leave a validation to the training that resumes: the machine may be gone before it ends."""
        if state.global_step < state.max_steps:
            control.should_evaluate = False

    def _any_rank(self, device: torch.device) -> bool:
        """Return whether any rank has received SIGTERM. Every rank calls it after every step, so all stop together."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return self.asked
        asked = torch.tensor(float(self.asked), device=device)
        distributed.all_reduce(asked, distributed.ReduceOp.MAX)
        return bool(asked)

    def shield(self, loader: Any) -> None:
        """Keep the data loader's workers alive while the training is watched.

        SIGTERM goes to all processes of a job. It would end a worker, and the loader would then raise an error before
        the step that is to be saved has ended.
        """
        if loader.num_workers:
            loader.worker_init_fn = _ShieldedWorker(loader.worker_init_fn, self._watching)


class _ShieldedWorker:
    """Runs first in a worker of the data loader."""

    def __init__(self, start: Callable[[int], None] | None, watching: Any):
        self.start, self.watching = start, watching

    def __call__(self, number: int) -> None:
        if self.start is not None:
            self.start(number)
        # Replaces torch's own handler. The signal is not ignored for good: at its exit, Python terminates workers that
        # are still running, and waits for them.
        signal.signal(signal.SIGTERM, self._leave)

    def _leave(self, number: int, frame: object) -> None:
        if not self.watching.value:
            os._exit(0)
