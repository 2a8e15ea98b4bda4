"""Measure an adapter while it is trained, every so many steps, and log it; the training does not notice."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from llava_steering_plugin.hooks.scope import current
from llava_steering_plugin.measures.modality import kinds_in_training
from llava_steering_plugin.training.beside import evaluating, model_to_evaluate, random_states_kept, splices_heard
from llava_steering_plugin.training.data.samples import data_seed
from llava_steering_plugin.training.diagnostics.file import DiagnosticsFile
from llava_steering_plugin.training.diagnostics.measuring import Subject, scalars
from llava_steering_plugin.training.diagnostics.samples import ChosenSample, as_loaded, choose_samples
from llava_steering_plugin.training.settings import diagnostics_flags
from llava_steering_plugin.training.steps import over_ranks

logger = logging.getLogger(__name__)


class TrainingDiagnostics(TrainerCallback):
    """Measures before the first step, after every N steps and at the end, each time on the same samples.

    All ranks run as many passes, because those of DDP and ZeRO-3 wait for each other; the first one writes.

    Args:
        trainer: whose training it is; its attachment is measured.
        every: so many steps.
        count: of the samples.
    """

    def __init__(self, trainer: Any, every: int, count: int):
        self.trainer, self.attachment, args = trainer, trainer._attachment, trainer.args
        self.every, self.count = every, count
        self.writes = args.process_index == 0
        layers = [layer.path for layer in self.attachment.shape.layers]
        self.subject = Subject(trainer.model, layers, self.attachment.modules)
        self.file = DiagnosticsFile(Path(args.output_dir))
        self._warned = False
        self._samples: list[ChosenSample] = []
        self._kinds: dict[int, Tensor | None] = {}  # by the place of a sample

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with random_states_kept():
            self._begin(args, state.global_step)
        if self._due(state) and not _measured(state):
            self._measure(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # After SIGTERM there is only time to save: the training that resumes measures this step.
        ending = control.should_training_stop and state.global_step < state.max_steps
        if self._due(state) and not ending:
            self._measure(args, state, control)

    def _due(self, state: Any) -> bool:
        step = state.global_step
        return bool(self._samples) and (step % self.every == 0 or step >= state.max_steps)

    def _begin(self, args: Any, step: int) -> None:
        """Choose the samples, and begin the file."""
        validation = self.trainer.eval_dataset
        data = self.trainer.train_dataset if validation is None else validation
        data, collator = as_loaded(self.trainer, data)
        self._samples = choose_samples(data, collator, self.count, data_seed(args))
        self._kinds = {}
        if not self.writes:
            return
        if not self._samples:
            logger.warning("--%s: no sample can be measured, so nothing is", diagnostics_flags.STEPS)
            return
        source = getattr(data, "source", None)
        mode = self.attachment.mode
        header = {
            "mode": mode.name,
            "settings": mode.settings(),
            "layers": len(self.subject.layers),
            "every": self.every,
            "data": None if source is None else str(source.path),
            "validation": validation is not None,
            "samples": [{"number": each.number, "id": each.id} for each in self._samples],
        }
        self.file.begin(header, step)

    def _measure(self, args: Any, state: Any, control: Any) -> None:
        """Run the pass over all samples, and log what it has found."""
        table = torch.zeros(len(self._samples), sum(self.subject.widths), dtype=torch.float64)
        share = math.ceil(len(table) / args.world_size)
        with random_states_kept(), torch.no_grad(), evaluating(model_to_evaluate(self.trainer)) as model:
            for turn in range(share):
                # A place behind the last one only makes the ranks' shares alike.
                place = turn * args.world_size + args.process_index
                row = self._row(model, place % len(table))
                if place < len(table):
                    table[place] = row
        found = self.subject.summary(over_ranks(table, args.device).cpu())
        record = found.record()
        self._warn(found.answers)
        if self.writes:
            self.file.append({"step": state.global_step, "epoch": state.epoch, **record})
        if logged := scalars(record):
            # Logging clears the wish to log, which the loss of this step may still have.
            wished = control.should_log
            self.trainer.log(logged)
            control.should_log = wished

    def _row(self, model: Any, place: int) -> Tensor:
        inputs = self.trainer._prepare_inputs(self._samples[place].batch)

        def forward() -> None:
            with self.trainer.compute_loss_context_manager():
                model(**inputs)

        if place not in self._kinds:
            self._kinds[place] = self._kinds_of(forward, inputs)
        return self.subject.measure(forward, self._kinds[place])

    def _kinds_of(self, forward: Callable[[], None], inputs: dict[str, Any]) -> Tensor | None:
        """Return what the positions of a sample hold.

        In LLaVA a pass of its own tells it: the attention is read while one runs. Otherwise the arguments do.
        """
        found: list[Tensor] = []
        family, ids = self.attachment.family, inputs["input_ids"]
        beginning = family.text_config.bos_token_id
        first = torch.zeros_like(ids[:, 0], dtype=torch.bool) if beginning is None else ids[:, 0] == beginning
        if not family.splices:
            tokens = family.tokens((), inputs)
            return None if tokens is None else kinds_in_training(tokens, inputs["labels"], first)

        def hear(result: tuple[Any, ...]) -> None:
            scope, labels = current(), result[5]
            if scope is not None and scope.tokens is not None and labels is not None:
                found.append(kinds_in_training(scope.tokens, labels, first.to(labels.device)))

        with splices_heard(self.trainer.model, hear):
            forward()
        return found[0] if found else None

    def _warn(self, answers: int | None) -> None:
        """Say once why there is no ratio."""
        if answers or self._warned or not self.writes:
            return
        self._warned = True
        why = (
            f"none of the {len(self._samples)} samples has an image and an answer"
            if answers is not None
            else self.subject.unreadable or "the attention cannot be read on another rank"
        )
        logger.warning("--%s leaves out the modality attention ratio: %s", diagnostics_flags.STEPS, why)


def _measured(state: Any) -> bool:
    """Return whether the log has a measurement of the step that a training goes on from."""
    return any(
        entry.get("step") == state.global_step and any(name.startswith("diagnostics/") for name in entry)
        for entry in state.log_history
    )
