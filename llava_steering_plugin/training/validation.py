"""Validate while a training runs, without changing it, and end it with its best checkpoint.

The loss of a validation is the mean over samples of each sample's own loss: that of training, for the sample alone.
Batches and ranks do not change it, and nothing but losses is kept or gathered.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from llava_steering_plugin.adapters.attachment import Attachment
from llava_steering_plugin.errors import DataError, UpstreamError
from llava_steering_plugin.hooks.token_map import IGNORED
from llava_steering_plugin.training.beside import evaluating, model_to_evaluate, spliced_labels
from llava_steering_plugin.training.data.samples import (
    ELSEWHERE,
    NumberedDataset,
    checked_samples,
    on_any_rank,
    take_marks,
)
from llava_steering_plugin.training.data.source import refusal
from llava_steering_plugin.training.saving.best_checkpoint import METRIC
from llava_steering_plugin.training.saving.integrity import STATE
from llava_steering_plugin.training.settings.validation_flags import DATA, NO, strategy

logger = logging.getLogger(__name__)


def validation_data(arguments: Any, training_data: Any) -> Any:
    """Return the samples of --eval_data_path, read as LLaVA reads those of --data_path; None without the flag."""
    path = getattr(arguments, DATA, None)
    if not path:
        return None
    kind = type(training_data.dataset)
    return kind(data_path=path, tokenizer=training_data.tokenizer, data_args=training_data.data_args)


def refuse_bad_pictures(samples: NumberedDataset, arguments: Any) -> None:
    """Look at the pictures of all samples to validate on, unless bad samples are skipped; each rank at its share.

    The first evaluation would end the training, perhaps after hours.

    Raises:
        DataError: one cannot be read, here or on another rank. The message names the first one, and counts the others.
    """
    source = samples.source
    if source is None or samples.stand_ins is not None:
        return
    entries = samples.list_data_dict
    share = range(arguments.process_index, len(entries), arguments.world_size)
    bad = [(number, found) for number in share if (found := source.checks.of(entries[number], whole=True))]
    if on_any_rank(bool(bad)):
        message = refusal(source, bad[0][0], entries[bad[0][0]], bad[0][1], len(bad) - 1) if bad else ELSEWHERE
        raise DataError(message)


class ValidationMixin:
    """The part of LLaVA's trainer with a mode that evaluates; without a tuning mode it passes every call on."""

    model: Any
    args: Any
    accelerator: Any
    deepspeed: Any
    is_deepspeed_enabled: bool
    state: Any
    control: Any
    callback_handler: Any
    data_collator: Any
    eval_dataset: Any
    lr_scheduler: Any
    _attachment: Attachment | None = None
    _preemption: Any
    _eval_loader: Any = None
    evaluate: Any

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if self._attachment is None or (eval_dataset is None and self.eval_dataset is None):
            return super().get_eval_dataloader(eval_dataset)  # type: ignore[misc]
        if eval_dataset is not None and eval_dataset is not self.eval_dataset:
            return self._loader_of(eval_dataset)
        if self._eval_loader is None:  # once: its workers may be persistent
            self._eval_loader = self._loader_of(self.eval_dataset)
        return self._eval_loader

    def _loader_of(self, dataset: Any) -> DataLoader[Any]:
        """Return a loader of this rank's share, in the order of the file. All ranks get as many batches.

        accelerate's loaders would take part in gradient accumulation, and their last batches need guessing.
        """
        numbered = dataset if isinstance(dataset, NumberedDataset) else checked_samples(dataset, self.args)
        workers = self.args.dataloader_num_workers
        loader: DataLoader[Any] = DataLoader(
            numbered,
            batch_size=self.args.eval_batch_size,
            sampler=[place % len(numbered) for place in self._places(len(numbered))],
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
        )
        self._preemption.shield(loader)
        return loader

    def _places(self, samples: int) -> Sequence[int]:
        """Return the places of this rank's share; those behind the last sample only make the shares alike."""
        world = self.args.world_size
        return range(self.args.process_index, world * math.ceil(samples / world), world)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        if self._attachment is None:
            return super().evaluation_loop(  # type: ignore[misc]
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        samples: NumberedDataset = dataloader.dataset
        table = torch.zeros(len(samples), 2, dtype=torch.float64)
        places = iter(self._places(len(samples)))
        self.callback_handler.eval_dataloader = dataloader
        with evaluating(model_to_evaluate(self)) as model:
            for batch in dataloader:
                numbers = take_marks(batch, set())
                assert numbers is not None
                losses = self._losses(model, self._prepare_inputs(batch))  # type: ignore[attr-defined]
                # The places last: zip() takes from the first before it notices that another has ended.
                for number, loss, place in zip(numbers.tolist(), losses, places, strict=False):
                    if place < len(samples):
                        table[number] = loss
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if distributed.is_available() and distributed.is_initialized() and self.args.world_size > 1:
            shared = table.to(self.args.device)
            distributed.all_reduce(shared)
            table = shared.cpu()
        supervised = table[:, 1] > 0
        self._warn_of_missing(samples, supervised)
        loss = float((table[supervised, 0] / table[supervised, 1]).mean())
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": loss}, len(samples))

    def _losses(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Return the sum of the losses of each row's targets, and their number: float64 [rows, 2] on the CPU."""
        with torch.no_grad(), spliced_labels(self.model) as spliced:
            with self.compute_loss_context_manager():  # type: ignore[attr-defined]
                outputs = model(**inputs)
            logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[1]
            labels = (spliced[-1] if spliced else inputs["labels"]).to(logits.device)
            if logits.shape[:2] != labels.shape:
                raise UpstreamError(
                    f"this LLaVA returns logits of shape {list(logits.shape)} for labels of shape "
                    f"{list(labels.shape)}, so a validation cannot tell the losses of samples."
                )
            rows = [
                # Row by row: all at once would take another copy of the logits.
                nn.functional.cross_entropy(
                    row[:-1].float(), targets[1:], ignore_index=IGNORED, reduction="sum"
                ).double()
                for row, targets in zip(logits, labels, strict=True)
            ]
            return torch.stack([torch.stack(rows), (labels[:, 1:] != IGNORED).sum(1).double()], 1).cpu()

    def _warn_of_missing(self, samples: NumberedDataset, supervised: Tensor) -> None:
        missing = (~supervised).nonzero().flatten().tolist()
        if missing and self.args.process_index == 0:
            named = ", ".join(samples.name_of(number) for number in missing[:5]) + ", ..." * (len(missing) > 5)
            logger.warning(
                "%d validation sample(s) do not count, because they are bad or have no supervised token: %s",
                len(missing),
                named,
            )

    def _note_best(self, metrics: Mapping[str, float], checkpoint: Path) -> None:
        """Note the checkpoint as the best one if its loss is the smallest, also in its own state."""
        loss = metrics[METRIC]
        if self.args.metric_for_best_model is None or math.isnan(loss):
            return
        state = self.state
        if None in (state.best_metric, state.best_model_checkpoint) or loss < state.best_metric:
            state.best_metric, state.best_model_checkpoint = loss, str(checkpoint)
        if self.args.should_save:
            partial = checkpoint / f".{STATE}.partial"
            state.save_to_json(str(partial))
            os.replace(partial, checkpoint / STATE)

    def _evaluate_at_the_end(self) -> None:
        """Evaluate once, where that was asked for and evaluations while training were not."""
        if not self.args.do_eval or strategy(self.args) != NO or self.eval_dataset is None:
            return
        if self.is_deepspeed_enabled and self.deepspeed is None:
            logger.warning("--do_eval: the training had ended before, and its engine is gone; nothing is evaluated.")
            return
        self.evaluate()
