"""Run combinations in processes that are forked from this one, in which LLaVA is imported already.

A combination that crashes, or takes memory that is never given back, harms no other.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from experiments.combinations.cells import Cell
from experiments.combinations.outcomes import FAILED, OK, REFUSED, Outcome, read, write
from experiments.combinations.parts import Parts, build_parts
from experiments.combinations.trial import Refused, attempt
from llava_steering_plugin.comparison.provenance import now

# The same numbers everywhere, and nothing from a network.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_DISABLED": "true",
    "CUDA_VISIBLE_DEVICES": "",
}
LIMIT_SECONDS = 3600  # for one combination: it takes seconds, and minutes where much else runs


class Runner:
    """Runs combinations and keeps their outcomes below `output`.

    Args:
        output: the folder of everything.
        made_by: what made the outcomes.
    """

    def __init__(self, output: Path, made_by: dict[str, Any]):
        self.results, self.logs, self.work = output / "results", output / "logs", output / "work"
        self.made_by = made_by
        for folder in (self.results, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)  # of a run that was killed

    def run(self, cells: Sequence[Cell], parts: Parts, jobs: int, ended: Callable[[Cell, Outcome], None]) -> None:
        """Run combinations, `jobs` at a time.

        Args:
            ended: called after each with what came out of it.
        """
        import torch

        torch.set_num_threads(1)  # before a fork: threads do not survive one
        gc.collect()
        gc.freeze()  # accelerate collects at the start of every training
        context = multiprocessing.get_context("fork")
        left, running = list(reversed(cells)), dict[ForkProcess, tuple[Cell, float]]()
        try:
            while left or running:
                while left and len(running) < jobs:
                    cell = left.pop()
                    process = context.Process(target=self._alone, args=(cell, parts), daemon=True)
                    process.start()
                    running[process] = (cell, time.monotonic())
                wait([process.sentinel for process in running], timeout=1)
                for process, (cell, started) in list(running.items()):
                    taken = time.monotonic() - started
                    if process.is_alive() and taken <= LIMIT_SECONDS:
                        continue
                    late = process.is_alive()
                    process.kill()
                    process.join()
                    del running[process]
                    ended(cell, self._outcome(cell, process.exitcode, taken, late))
        finally:
            for process in running:
                process.kill()
                process.join()
            shutil.rmtree(self.work, ignore_errors=True)

    def _alone(self, cell: Cell, parts: Parts) -> None:
        """Run one combination in this process, which is its own, and write what came out."""
        log = os.open(self._log(cell), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work = self.work / cell.name
        work.mkdir(parents=True)
        started = time.monotonic()
        result, reason = OK, ""
        try:
            attempt(cell, parts, work)
        except Refused as error:
            result, reason = REFUSED, str(error)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is what came out
            traceback.print_exc()
            result, reason = FAILED, f"{type(error).__name__}: {error}"
        reason = reason.replace(str(self.work.parent), "...")
        write(self.results, cell, Outcome(result, reason, time.monotonic() - started, now(), self.made_by))
        sys.stdout.flush()
        sys.stderr.flush()

    def _outcome(self, cell: Cell, status: int | None, seconds: float, late: bool) -> Outcome:
        """Return what a combination has written; if it has written nothing, say how it ended."""
        shutil.rmtree(self.work / cell.name, ignore_errors=True)
        outcome = read(self.results, [cell]).get(cell)
        if late or status != 0 or outcome is None:
            why = f"it took more than {LIMIT_SECONDS} s" if late else f"its process ended with {status}"
            outcome = Outcome(FAILED, why, seconds, now(), self.made_by)
            write(self.results, cell, outcome)
        if outcome.result != FAILED:
            self._log(cell).unlink(missing_ok=True)
        return outcome

    def _log(self, cell: Cell) -> Path:
        return self.logs / f"{cell.name}.txt"


def prepared(output: Path) -> Parts:
    """Import LLaVA into this process and build the models."""
    os.environ.update(ENVIRONMENT)
    from llava_steering_plugin.lazy_imports import defer_compilation

    defer_compilation()
    import llava.model.builder
    import llava.train.train  # noqa: F401

    return build_parts(output / "models")
