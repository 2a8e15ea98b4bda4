"""Keep the best checkpoint of a training by its validation loss, also where the training was resumed or moved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from llava_steering_plugin.errors import CheckpointError
from llava_steering_plugin.training.saving.integrity import STATE
from llava_steering_plugin.training.settings.validation_flags import EPOCH, STEPS, strategy

METRIC = "eval_loss"


class ResumedValidation(TrainerCallback):
    """Takes up the validation of a training that resumes: its intervals, its best checkpoint, a missed evaluation.

    Args:
        trainer: whose validation it is.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.checkpoint: Path | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.checkpoint is None:
            return
        for name in ("logging_steps", "eval_steps", "save_steps"):
            # transformers takes them from the checkpoint, and ignores the flags of this training.
            if (given := getattr(args, name)) is not None:
                setattr(state, name, math.ceil(given * state.max_steps) if given < 1 else int(given))
        if state.best_model_checkpoint is not None:
            state.best_model_checkpoint = str(best_checkpoint(state, self.checkpoint) or state.best_model_checkpoint)
        if self._missed(args, state):
            metrics = self.trainer.evaluate()
            self.trainer._note_best(metrics, self.checkpoint)
            if isinstance(self.trainer.lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                self.trainer.lr_scheduler.step(metrics[METRIC])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # An epoch may end between two steps: a run that resumes from the last one comes to its end once more.
        if _evaluated(state):
            control.should_evaluate = False

    @staticmethod
    def _missed(args: Any, state: Any) -> bool:
        """Return whether the step of the checkpoint was to be evaluated: a SIGTERM leaves time for saving only."""
        if _evaluated(state):
            return False
        if strategy(args) == STEPS:
            return state.global_step % state.eval_steps == 0 and args.eval_delay <= state.global_step
        return (
            strategy(args) == EPOCH and abs(state.epoch - round(state.epoch)) < 1e-6 and args.eval_delay <= state.epoch
        )


def _evaluated(state: Any) -> bool:
    """Return whether a training has been evaluated at the step that it is at."""
    return any(METRIC in entry and entry.get("step") == state.global_step for entry in state.log_history)


def best_checkpoint(state: TrainerState, checkpoint: Path) -> Path | None:
    """Return where the best checkpoint of a training lies, also if its folder was moved; None if it is gone.

    Args:
        state: of the training.
        checkpoint: another checkpoint of it.
    """
    named = Path(state.best_model_checkpoint or "")
    return next((path for path in (named, checkpoint.parent / named.name) if (path / STATE).is_file()), None)


def refuse_lost_best(args: Any, checkpoint: Path) -> None:
    """Refuse to resume from a checkpoint where --load_best_model_at_end could not keep its promise.

    Raises:
        CheckpointError: the best checkpoint so far is gone.
    """
    state = TrainerState.load_from_json(str(checkpoint / STATE))
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return
    if best_checkpoint(state, checkpoint) is None:
        raise CheckpointError(
            f"{checkpoint} resumes a training whose best checkpoint so far, {state.best_model_checkpoint}, is gone, "
            "and --load_best_model_at_end would load it. Put it back, or leave that flag out."
        )


def without_nan(metrics: Mapping[str, float] | None) -> Mapping[str, float] | None:
    """Return metrics that may decide which checkpoint is the best; None for those of a model that has diverged.

    No number is smaller than NaN, so it would stay the best for good.
    """
    return None if metrics is None or math.isnan(metrics.get(METRIC, 0.0)) else metrics
