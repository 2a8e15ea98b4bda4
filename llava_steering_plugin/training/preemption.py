"""SIGTERM, as machines that may be taken away send it: all ranks save the same step, and exit."""

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

# What a shell reports for a process that SIGTERM ended: it tells a launcher that the training is not finished.
EXIT_STATUS = 128 + signal.SIGTERM


class Preemption(TrainerCallback):
    """After a SIGTERM to any rank: a checkpoint at the end of the current step, then the end of the training."""

    def __init__(self) -> None:
        self.asked = False  # this rank was
        self.agreed = False  # and all ranks stop for it
        self._watching = RawValue("b", 0)  # in memory that data loader workers share

    @contextmanager
    def watched(self) -> Iterator[None]:
        """For the length of a training, SIGTERM only makes a note; the process exits behind the block if all agreed.

        Raises:
            SystemExit: the training was stopped. The same command continues from the checkpoint.
        """
        # Python takes handlers in its main thread only; a training elsewhere (a notebook's) ends as it always did.
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
            # Other ranks need not know of it, and a rank that left now would keep them waiting in the last save.
            logger.warning("SIGTERM came after the last step: the training is complete, and only saves its result.")

    def _note(self, number: int, frame: object) -> None:
        # Nothing else, and as often as it comes: a scheduler signals all processes, and torchrun passes it on again.
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.agreed = self._any_rank(args.device)
        if self.agreed:
            logger.warning("SIGTERM: saving checkpoint-%d in %s, then stopping.", state.global_step, args.output_dir)
            control.should_save = True
            control.should_training_stop = True

    def _any_rank(self, device: torch.device) -> bool:
        """Whether any rank was asked. Every rank calls it after every step, so that all stop after the same one."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return self.asked
        asked = torch.tensor(float(self.asked), device=device)
        distributed.all_reduce(asked, distributed.ReduceOp.MAX)
        return bool(asked)

    def shield(self, loader: Any) -> None:
        """Keeps the data loader's workers alive while the training is watched.

        SIGTERM goes to all processes of a job. A worker would die of it, and the loader then raises before the step
        that is to be saved has ended.
        """
        if loader.num_workers:
            loader.worker_init_fn = _ShieldedWorker(loader.worker_init_fn, self._watching)


class _ShieldedWorker:
    """What a data loader's worker runs first."""

    def __init__(self, start: Callable[[int], None] | None, watching: Any):
        self.start, self.watching = start, watching

    def __call__(self, number: int) -> None:
        if self.start is not None:
            self.start(number)
        # Over torch's own handler. Not ignored for good: the end of Python terminates workers that were left behind,
        # and then waits for them.
        signal.signal(signal.SIGTERM, self._leave)

    def _leave(self, number: int, frame: object) -> None:
        if not self.watching.value:
            os._exit(0)
