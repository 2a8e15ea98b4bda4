"""Extend LLaVA's trainer: an adapter is attached before it starts, and it goes over samples in an order of its own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback, TrainerState

from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.hooks.token_map import IGNORED
from llava_steering_plugin.training.attaching import refuse_unsupported
from llava_steering_plugin.training.data.samples import (
    HASHED,
    SAME_ORDER,
    EpochSeededSampler,
    NumberedCollator,
    checked_samples,
    data_seed,
    follow_epochs,
    take_marks,
)
from llava_steering_plugin.training.data.skipped import SkippedSamples
from llava_steering_plugin.training.measured import measure
from llava_steering_plugin.training.saving import notes
from llava_steering_plugin.training.saving.best_checkpoint import ResumedValidation, refuse_lost_best, without_nan
from llava_steering_plugin.training.saving.resume_position import ResumePositionMixin
from llava_steering_plugin.training.saving.resuming import wish_of
from llava_steering_plugin.training.settings import diagnostics_flags
from llava_steering_plugin.training.settings.flags import mode_is_on
from llava_steering_plugin.training.trainer import SteeringTrainerMixin
from llava_steering_plugin.training.validation import ValidationMixin, refuse_bad_pictures, validation_data
from llava_steering_plugin.upstream.train.attaching import attach_mode

logger = logging.getLogger(__name__)


class LlavaTrainerMixin(SteeringTrainerMixin, ValidationMixin, ResumePositionMixin):
    """Comes before LLaVA's trainer in the bases of a new class; without a tuning mode it passes every call on."""

    train_dataset: Any
    _needs_adapter = False
    _order = HASHED

    def __init__(self, *positional: Any, **kwargs: Any):
        arguments: Any = kwargs.get("args")
        if not mode_is_on(arguments):
            super().__init__(*positional, **kwargs)
            measure(self)
            return
        refuse_unsupported(arguments)
        attach_mode(kwargs.get("model"), arguments, kwargs.get("tokenizer"))
        data = kwargs["train_dataset"] = checked_samples(kwargs["train_dataset"], arguments)
        validated = validation_data(arguments, data) or kwargs.get("eval_dataset")
        if validated is not None:
            validated = checked_samples(validated, arguments)
            refuse_bad_pictures(validated, arguments)
        kwargs["eval_dataset"] = validated
        kwargs["data_collator"] = NumberedCollator(kwargs["data_collator"])
        self._loss_warned = False
        self._resumed_validation = ResumedValidation(self)
        self._skipped: set[int] = set()
        super().__init__(
            **kwargs,
            steering_diagnostics_steps=getattr(arguments, diagnostics_flags.STEPS),
            steering_diagnostics_samples=diagnostics_flags.samples(arguments),
        )
        measure(self)

    def _introduce(self) -> None:
        """`attach_mode` has."""

    def _callbacks(self, attachment: Attachment) -> list[TrainerCallback]:
        found: list[TrainerCallback] = [self._resumed_validation, *super()._callbacks(attachment)]
        if self.args.skip_bad_samples:
            found.append(SkippedSamples(self.train_dataset, Path(self.args.output_dir), self._skipped))
        return found

    def _wish(self, asked: str | bool | None) -> Any:
        return wish_of(asked, self.args)

    def _begin(self, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            self._order = notes.order_of(checkpoint)
            refuse_lost_best(self.args, checkpoint)
        self._resumed_validation.checkpoint = checkpoint
        self._plan_course(checkpoint)

    def _at_the_end(self) -> None:
        self._evaluate_at_the_end()

    def _length(self, state: TrainerState) -> int:
        return self._course.length(self.args)[0]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any) -> Tensor:
        numbers = None if self._attachment is None else take_marks(inputs, self._skipped)
        loss: Tensor = super().training_step(model, inputs, *rest)  # type: ignore[misc]
        # The loss of a batch without targets is 0/0; transformers itself looks at the loss after every step.
        if numbers is not None and not self._loss_warned and bool(torch.isnan(loss)):
            self._loss_warned = True
            self._warn_of_loss(inputs, numbers)
        return loss

    def _warn_of_loss(self, inputs: dict[str, Any], numbers: Tensor) -> None:
        names = ", ".join(self.train_dataset.name_of(int(number)) for number in numbers)
        supervised = int((inputs["labels"] != IGNORED).sum())
        why = (
            f"if its {supervised} targets lie beyond --model_max_length once the images are inserted, no supervised "
            "token is left; otherwise the training has diverged: lower --learning_rate, or use --bf16 instead of --fp16"
            if supervised
            else "it has no supervised token: there is no answer, the prompt fills --model_max_length, or LLaVA has "
            "masked a sample that it cannot tokenise"
        )
        logger.warning("the loss of a batch is not a number, so the batch has no effect: %s; %s.", names, why)

    def _get_train_sampler(self, *rest: Any) -> Any:
        # From 4.52 on transformers hands the samples over, which are the trainer's own: LLaVA's method takes none.
        sampler = super()._get_train_sampler()  # type: ignore[misc]
        if sampler is None or (self._attachment is None and not SAME_ORDER.get()):
            return sampler
        return EpochSeededSampler(sampler, data_seed(self.args), self._order)

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        follow_epochs(loader)
        if self._attachment is not None and not len(loader):
            raise ArgumentsError(
                f"--dataloader_drop_last leaves no batch of {len(self.train_dataset)} samples: they do not fill "
                f"one of {self.args.train_batch_size} on each of {self.args.world_size} rank(s). Leave it out, or "
                "lower --per_device_train_batch_size."
            )
        return self._from_here(loader)

    def _save_beside(self, folder: Path, *, checkpoint: bool) -> None:
        if checkpoint:
            notes.write(folder, self._order, self._steps.state(), data=self._data.as_json())

    def _save_checkpoint(self, model: Any, trial: Any, metrics: Any = None) -> None:
        if self._attachment is None:
            super()._save_checkpoint(model, trial, metrics)
            return
        step = self.state.global_step
        if step == self._saved_step:
            # After a SIGTERM, `--save_strategy epoch` asks again for the checkpoint of this step.
            if metrics is not None:
                self._note_best(metrics, Path(self.args.output_dir) / f"checkpoint-{step}")
            return
        super()._save_checkpoint(model, trial, without_nan(metrics))
        self._saved_step = step
