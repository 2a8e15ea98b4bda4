"""transformers' Trainer with `SteeringTrainerMixin`, on a base of transformers' own classes and easy-VQA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from chat_bases import Collator, samples
from transformers import AutoProcessor, Trainer, TrainingArguments

from llava_steering_plugin import SteeringTrainerMixin, get_model
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.mores import MoReS


class SteeringTrainer(SteeringTrainerMixin, Trainer):
    """As a user writes it."""


def trainer_of(base: Path, output: Path, mode: Mode | None, model: Any = None, **flags: Any) -> Any:
    """A trainer of six steps with a checkpoint halfway.

    Args:
        mode: of the adapter; None for MoReS.
        model: one that carries an adapter already; None: `base` with a fresh one.
        flags: for TrainingArguments, and arguments of the trainer.
    """
    # A config of DeepSpeed's has to be read before the model is loaded.
    ours = {key: flags.pop(key) for key in list(flags) if key.startswith("steering") or key == "eval_dataset"}
    arguments = TrainingArguments(
        str(output),
        **{
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "save_steps": 3,
            "logging_steps": 1,
            "max_steps": 6,
            "report_to": [],
            "use_cpu": True,
            "remove_unused_columns": False,
            "disable_tqdm": True,
        }
        | flags,
    )
    if model is None:
        model = transformers.AutoModelForImageTextToText.from_pretrained(base)
        torch.manual_seed(1)
        get_model(model, mode or MoReS(rank=2))
    processor = AutoProcessor.from_pretrained(base)
    data: Any = samples(8)
    return SteeringTrainer(
        model=model, args=arguments, train_dataset=data, data_collator=Collator(processor),
        processing_class=processor, **ours,
    )  # fmt: skip
