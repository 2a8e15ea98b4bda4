"""Extend a trainer of transformers' kind: it trains, saves and resumes the adapter on its model, not the model."""

from __future__ import annotations

import logging
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from llava_steering_plugin.adapters.attachment import Attachment, attachment_of
from llava_steering_plugin.adapters.save_load import restore, save_adapter
from llava_steering_plugin.adapters.stored.folder import AdapterFolder
from llava_steering_plugin.errors import ArgumentsError, SteeringError, listing
from llava_steering_plugin.training import deepspeed, provenance, steps
from llava_steering_plugin.training.attaching import (
    changes_undone,
    introduce,
    marked_as_peft,
    refuse_unsaved,
    refuse_unsupported,
)
from llava_steering_plugin.training.beside import random_states_kept
from llava_steering_plugin.training.diagnostics.callback import TrainingDiagnostics
from llava_steering_plugin.training.gradient_check import GradientCheck
from llava_steering_plugin.training.saving import beside_adapter, checkpoints, integrity, notes
from llava_steering_plugin.training.saving.best_checkpoint import best_checkpoint
from llava_steering_plugin.training.saving.preemption import Preemption
from llava_steering_plugin.training.saving.resuming import refuse_without_states
from llava_steering_plugin.training.settings.diagnostics_flags import DEFAULT_SAMPLES, diagnostics_problems
from llava_steering_plugin.training.settings.flags import CANNOT_START

logger = logging.getLogger(__name__)


class SteeringTrainerMixin:
    """Comes before a trainer in the bases of a new class: `class Trainer(SteeringTrainerMixin, SFTTrainer): pass`.

    Its checkpoints are adapters, and it resumes from complete ones alone. It checks that every parameter of the adapter
    gets a gradient (`GradientCheck`), logs what the mode reports, prints the table of parameters, and stops in order at
    a SIGTERM.

    Args:
        steering_diagnostics_steps: measure attention to images, updates and routers before the first step, every so
            many steps and at the end; 0: never.
        steering_diagnostics_samples: on so many samples of `eval_dataset`, or else of `train_dataset`.

    All other arguments are the trainer's. Its model carries an adapter, as `get_model` and `from_pretrained` return it.

    Raises:
        SteeringError: the model carries no adapter, or parameters of the base are trained that it would not save.
        ArgumentsError: FSDP, or several GPUs in one process.
        CheckpointError: the output folder cannot be written, or holds what others have made.
    """

    model: Any
    args: Any
    accelerator: Any
    is_deepspeed_enabled: bool
    state: Any
    _attachment: Attachment | None = None
    _needs_adapter = True  # a trainer that also trains models without one passes every call on
    _order = notes.ITS_OWN  # the rule for the order of samples

    def __init__(
        self,
        *positional: Any,
        steering_diagnostics_steps: int = 0,
        steering_diagnostics_samples: int = DEFAULT_SAMPLES,
        **kwargs: Any,
    ):
        model: Any = kwargs["model"] if "model" in kwargs else next(iter(positional), None)
        self._attachment = attachment_of(model) if isinstance(model, torch.nn.Module) else None
        if self._attachment is None:
            if self._needs_adapter:
                raise SteeringError(
                    f"{type(self).__name__} trains adapters, and its model carries none. Give it what "
                    "llava_steering_plugin.get_model(model, mode) returns."
                )
            super().__init__(*positional, **kwargs)
            return
        self._measures = steering_diagnostics_steps, steering_diagnostics_samples
        given = Namespace(steering_diagnostics_steps=self._measures[0])
        if problems := diagnostics_problems(given):
            raise ArgumentsError(listing(CANNOT_START, problems))
        refuse_unsaved(self._attachment)
        if (arguments := kwargs.get("args")) is not None:
            self._prepare(arguments)
        with marked_as_peft(model), changes_undone(self._attachment):
            super().__init__(*positional, **kwargs)
        if arguments is None:  # the trainer has made its own
            self._prepare(self.args)
        self._introduce()
        self._preemption = Preemption()
        self._steps = steps.StepEnd(self._attachment.mode.statistics(self._attachment.modules))
        for callback in self._callbacks(self._attachment):
            self.add_callback(callback)  # type: ignore[attr-defined]

    def _prepare(self, arguments: Any) -> None:
        refuse_unsupported(arguments)
        if arguments.process_index == 0:
            checkpoints.prepare_output(Path(arguments.output_dir))

    def _introduce(self) -> None:
        """Record where the adapter comes from, and print what is trained."""
        assert self._attachment is not None
        provenance.record_precision(self._attachment, self.args)
        if self.args.process_index == 0:
            introduce(self._attachment)

    def _callbacks(self, attachment: Attachment) -> list[TrainerCallback]:
        found: list[TrainerCallback] = [self._preemption, self._steps, GradientCheck.of(attachment)]
        if self._measures[0]:
            found.append(TrainingDiagnostics(self, *self._measures))
        return found

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if self._attachment is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        wish = self._wish(resume_from_checkpoint)
        found = checkpoints.checkpoint_to_resume(wish, self.args, self.is_deepspeed_enabled)
        if found is not None:
            provenance.refuse_another_training(self._attachment, found)
        self._begin(found)
        self._steps.begin(self.args)
        if found is not None:
            self._steps.resume(notes.gathered_in(found))
        if found is not None and self._ended_with(found):
            self._at_the_end()
            return TrainOutput(self.state.global_step, float("nan"), {})
        if found is not None:
            refuse_without_states(found)
        with self._preemption.watched():
            result = super().train(None if found is None else str(found), *args, **kwargs)  # type: ignore[misc]
        self._at_the_end()
        return result

    def _wish(self, asked: str | bool | None) -> Any:
        """Return what the training is to resume from: a folder, True for the newest of its own, or nothing."""
        return asked

    def _begin(self, checkpoint: Path | None) -> None:
        """Prepare for a training from the beginning, or from a checkpoint."""

    def _at_the_end(self) -> None:
        """Do what is left when the training has ended."""

    def _length(self, state: TrainerState) -> int:
        """Return how many steps the training has that a checkpoint with this state is of."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        more = self.args.num_train_epochs > state.num_train_epochs
        return int(state.max_steps) + more

    def _ended_with(self, checkpoint: Path) -> bool:
        """Return whether a checkpoint is the end of this training; if so, load its adapter and state.

        The loop of transformers asks only after a step whether it was the last one, and would train one step too many.
        """
        state = TrainerState.load_from_json(str(checkpoint / integrity.STATE))
        if state.global_step < self._length(state):
            return False
        logger.warning("%s is the end of this training; only its result is left to save.", checkpoint)
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        if self.args.load_best_model_at_end and (best := best_checkpoint(state, checkpoint)) is not None:
            state.best_model_checkpoint = str(best)
            self._load_best_model()
        return True

    def _load_best_model(self) -> None:
        if self._attachment is None:
            super()._load_best_model()  # type: ignore[misc]
            return
        best, metric = self.state.best_model_checkpoint, self.args.metric_for_best_model
        name = "validation loss" if metric in ("loss", "eval_loss") else metric
        logger.warning("the result is the adapter of %s, whose %s is %.4f.", best, name, self.state.best_metric)
        restore(self._attachment, AdapterFolder(best).read())

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with random_states_kept() if self._attachment is not None else nullcontext():
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        if self._attachment is not None and "loss" in logs:
            logs = {**logs, **self._attachment.mode.report(self._attachment.modules)}
        super().log(logs, *rest)  # type: ignore[misc]

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if self._attachment is not None and self.is_deepspeed_enabled:
            # Where accelerate's config asks for DeepSpeed, the arguments know nothing of it.
            config = getattr(self.args, "hf_deepspeed_config", None) or (
                self.accelerator.state.deepspeed_plugin.hf_ds_config
            )
            deepspeed.remove_abandoned_locks()
            deepspeed.fix_zero_3(config.config, self._attachment.shape.hidden_size)
            # Not before: until the trainer stands, what it does to the dtypes of trained parameters is undone.
            deepspeed.fix_preparation(self.accelerator, config.dtype() if config.is_zero3() else None)

    def create_optimizer(self, *args: Any) -> Any:
        optimizer = super().create_optimizer(*args)  # type: ignore[misc]
        # An optimizer that DeepSpeed's config names is only a placeholder here, and has no groups.
        if self._attachment is not None and hasattr(optimizer, "param_groups"):
            # Groups by weight decay may be empty when so little is trained. DeepSpeed drops those, and the scheduler
            # then gives a group the learning rate of another one.
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()  # type: ignore[misc]
        if self._attachment is not None:
            self._preemption.shield(loader)
        return loader

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self._attachment is None:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        folder = Path(output_dir or self.args.output_dir)
        save_adapter(self.model, folder, write=self.args.should_save)
        if self.args.should_save:
            self._save_beside(folder, checkpoint=_internal_call and output_dir is not None)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Adapter save")  # type: ignore[attr-defined]

    def _save_beside(self, folder: Path, *, checkpoint: bool) -> None:
        """Write into an adapter's folder what transformers writes beside a model, and the notes of a checkpoint."""
        beside_adapter.write(self, folder)
        if checkpoint:
            notes.write(folder, self._order, self._steps.state())

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Leave the card of the adapter as it is: it is written with the adapter."""
        if self._attachment is None:
            super().create_model_card(*args, **kwargs)  # type: ignore[misc]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._attachment is not None and self.args.process_index == 0:
            beside_adapter.copy_adapter(Path(checkpoint_folder), Path(self.args.output_dir))
        super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any, *metrics: Any) -> None:
        if self._attachment is None:
            super()._save_checkpoint(model, trial, *metrics)  # type: ignore[misc]
            return
        output, step = Path(self.args.output_dir), self.state.global_step
        with checkpoints.explain_write_errors(output, f"checkpoint-{step}", tidy=self.args.should_save):
            if self.args.should_save:
                checkpoints.remove_step(output, step)
            # Each rank checks whether the folder is there.
            self.args.distributed_state.wait_for_everyone()
            super()._save_checkpoint(model, trial, *metrics)  # type: ignore[misc]

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
