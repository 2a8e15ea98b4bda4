"""Extend LLaVA's trainer: an adapter is attached before it starts, and saved and resumed instead of the model."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.adapters.save_load import restore, save_adapter
from llava_steering_plugin.adapters.stored.folder import AdapterFolder
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.hooks.token_map import IGNORED
from llava_steering_plugin.training import deepspeed, provenance, steps
from llava_steering_plugin.training.attaching import attach_mode, marked_as_peft, refuse_unsupported
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
from llava_steering_plugin.training.diagnostics.callback import TrainingDiagnostics
from llava_steering_plugin.training.gradient_check import GradientCheck
from llava_steering_plugin.training.measured import measure
from llava_steering_plugin.training.saving import checkpoints, integrity, notes
from llava_steering_plugin.training.saving.best_checkpoint import (
    ResumedValidation,
    best_checkpoint,
    refuse_lost_best,
    without_nan,
)
from llava_steering_plugin.training.saving.preemption import Preemption
from llava_steering_plugin.training.saving.resume_position import ResumePositionMixin
from llava_steering_plugin.training.saving.resuming import refuse_without_states, wish_of
from llava_steering_plugin.training.settings.flags import mode_is_on
from llava_steering_plugin.training.validation import ValidationMixin, refuse_bad_pictures, validation_data

logger = logging.getLogger(__name__)


class SteeringTrainerMixin(ValidationMixin, ResumePositionMixin):
    """Comes before LLaVA's trainer in the bases of a new class; without a tuning mode it passes every call on."""

    model: Any
    args: Any
    train_dataset: Any
    accelerator: Any
    is_deepspeed_enabled: bool
    state: Any
    _attachment: Attachment | None = None
    _order = HASHED  # the rule for the order of samples

    def __init__(self, *positional: Any, **kwargs: Any):
        arguments: Any = kwargs.get("args")
        model = kwargs.get("model")
        if not mode_is_on(arguments):
            super().__init__(*positional, **kwargs)
            measure(self)
            return
        refuse_unsupported(arguments)
        self._attachment = attach_mode(model, arguments, kwargs.get("tokenizer"))
        if arguments.process_index == 0:
            checkpoints.prepare_output(Path(arguments.output_dir))
        data = kwargs["train_dataset"] = checked_samples(kwargs["train_dataset"], arguments)
        validated = validation_data(arguments, data) or kwargs.get("eval_dataset")
        if validated is not None:
            validated = checked_samples(validated, arguments)
            refuse_bad_pictures(validated, arguments)
        kwargs["eval_dataset"] = validated
        kwargs["data_collator"] = NumberedCollator(kwargs["data_collator"])
        with marked_as_peft(model):
            super().__init__(**kwargs)
        self._loss_warned = False
        self._preemption = Preemption()
        self.add_callback(self._preemption)  # type: ignore[attr-defined]
        self._resumed_validation = ResumedValidation(self)
        self.add_callback(self._resumed_validation)  # type: ignore[attr-defined]
        self._steps = steps.StepEnd(self._attachment.mode.statistics(self._attachment.modules))
        self.add_callback(self._steps)  # type: ignore[attr-defined]
        self._skipped: set[int] = set()
        if arguments.skip_bad_samples:
            self.add_callback(SkippedSamples(data, Path(arguments.output_dir), self._skipped))  # type: ignore[attr-defined]
        self.add_callback(GradientCheck.of(self._attachment))  # type: ignore[attr-defined]
        if arguments.steering_diagnostics_steps:
            self.add_callback(TrainingDiagnostics(self))  # type: ignore[attr-defined]
        measure(self)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if self._attachment is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        wish = wish_of(resume_from_checkpoint, self.args)
        found = checkpoints.checkpoint_to_resume(wish, self.args, self.is_deepspeed_enabled)
        if found is not None:
            provenance.refuse_another_training(self._attachment, found)
            self._order = notes.order_of(found)
            refuse_lost_best(self.args, found)
        self._resumed_validation.checkpoint = found
        self._plan_course(found)
        self._steps.begin(self.args)
        if found is not None:
            self._steps.resume(notes.gathered_in(found))
        if found is not None and self._ended_with(found):
            self._evaluate_at_the_end()
            return TrainOutput(self.state.global_step, float("nan"), {})
        if found is not None:
            refuse_without_states(found)
        with self._preemption.watched():
            result = super().train(None if found is None else str(found), *args, **kwargs)  # type: ignore[misc]
        self._evaluate_at_the_end()
        return result

    def _ended_with(self, checkpoint: Path) -> bool:
        """Return whether a checkpoint is the end of this training; if so, load its adapter and state.

        The loop of transformers asks only after a step whether it was the last one, and would train one step too many.
        """
        state = TrainerState.load_from_json(str(checkpoint / integrity.STATE))
        if state.global_step < self._course.length(self.args)[0]:
            return False
        logger.warning("%s is the end of this training; only its result is left to save.", checkpoint)
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        if self.args.load_best_model_at_end and (best := best_checkpoint(state, checkpoint)) is not None:
            state.best_model_checkpoint = str(best)
            self._load_best_model()
        return True

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

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        if self._attachment is not None and "loss" in logs:
            logs = {**logs, **self._attachment.mode.report(self._attachment.modules)}
        super().log(logs, *rest)  # type: ignore[misc]

    def _get_train_sampler(self, *rest: Any) -> Any:
        sampler = super()._get_train_sampler(*rest)  # type: ignore[misc]
        if sampler is None or (self._attachment is None and not SAME_ORDER.get()):
            return sampler
        return EpochSeededSampler(sampler, data_seed(self.args), self._order)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if self._attachment is not None and self.is_deepspeed_enabled:
            config = self.args.hf_deepspeed_config
            deepspeed.remove_abandoned_locks()
            deepspeed.fix_zero_3(
                config.config, config.dtype(), self._attachment.model, self._attachment.shape.hidden_size
            )
            deepspeed.fix_preparation(self.accelerator)

    def create_optimizer(self) -> Any:
        optimizer = super().create_optimizer()  # type: ignore[misc]
        # An optimizer that DeepSpeed's config names is only a placeholder here, and has no groups.
        if self._attachment is not None and hasattr(optimizer, "param_groups"):
            # LLaVA's groups by weight decay may be empty when so little is trained. DeepSpeed drops those, and the
            # scheduler then gives a group the learning rate of another one.
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()  # type: ignore[misc]
        follow_epochs(loader)
        if self._attachment is not None:
            if not len(loader):
                raise ArgumentsError(
                    f"--dataloader_drop_last leaves no batch of {len(self.train_dataset)} samples: they do not fill "
                    f"one of {self.args.train_batch_size} on each of {self.args.world_size} rank(s). Leave it out, or "
                    "lower --per_device_train_batch_size."
                )
            self._preemption.shield(loader)
        return self._from_here(loader)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self._attachment is None:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        save_adapter(self.model, output_dir or self.args.output_dir, write=self.args.should_save)
        if self.args.should_save and _internal_call and output_dir is not None:  # a checkpoint
            notes.write(Path(output_dir), self._order, self._steps.state(), data=self._data.as_json())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Adapter save")  # type: ignore[attr-defined]

    def _save_checkpoint(self, model: Any, trial: Any, metrics: Any = None) -> None:
        if self._attachment is None:
            super()._save_checkpoint(model, trial, metrics)  # type: ignore[misc]
            return
        output, step = Path(self.args.output_dir), self.state.global_step
        if step == self._saved_step:
            # After a SIGTERM, `--save_strategy epoch` asks again for the checkpoint of this step.
            if metrics is not None:
                self._note_best(metrics, output / f"checkpoint-{step}")
            return
        with checkpoints.explain_write_errors(output, f"checkpoint-{step}", tidy=self.args.should_save):
            if self.args.should_save:
                checkpoints.remove_step(output, step)
            # Each rank checks whether the folder is there.
            self.args.distributed_state.wait_for_everyone()
            super()._save_checkpoint(model, trial, without_nan(metrics))  # type: ignore[misc]
        self._saved_step = step

    def _rotate_checkpoints(self, use_mtime: bool = False, output_dir: str | None = None) -> None:
        if self._attachment is None:
            super()._rotate_checkpoints(use_mtime, output_dir)  # type: ignore[misc]
            return
        checkpoints.rotate(
            Path(output_dir or self.args.output_dir),
            self.state.global_step,
            self.args.save_total_limit,
            without_states=checkpoints.model_only(self.args),
            best=self.state.best_model_checkpoint,
        )

    def save_state(self) -> None:
        explained = checkpoints.explain_write_errors(Path(self.args.output_dir), integrity.STATE, tidy=False)
        with explained if self._attachment is not None else nullcontext():
            super().save_state()  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._attachment is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        restore(self._attachment, AdapterFolder(resume_from_checkpoint).read())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._attachment is None:
            super()._load_rng_state(checkpoint)  # type: ignore[misc]
            return
        if checkpoint is not None and integrity.ranks_of(Path(checkpoint)) != self.args.world_size:
            return  # `checkpoint_to_resume` has warned, or there are no random states (--save_only_model)
        try:
            with checkpoints.random_states_allowed():
                super()._load_rng_state(checkpoint)  # type: ignore[misc]
        except (IndexError, KeyError) as error:
            # Each rank stores the states of all devices that it sees: there are fewer now, or there were none.
            logger.warning(
                "%s was written on other devices, and their random states do not fit these (%r), so dropout differs.",
                checkpoint,
                error,
            )
