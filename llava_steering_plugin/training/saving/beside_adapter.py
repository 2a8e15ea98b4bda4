"""Write into an adapter's folder what transformers' trainer writes beside a model: the processor, and its arguments."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from llava_steering_plugin.adapters.stored.folder import CARD, CONFIG, LLAVA_CONFIG, PEFT_CONFIG, WEIGHTS

ARGUMENTS = "training_args.bin"


def write(trainer: Any, folder: Path) -> None:
    """Write the processor or tokenizer of a training, and its arguments.

    Args:
        trainer: whose training it is.
        folder: holds the adapter.
    """
    processor = getattr(trainer, "processing_class", None) or getattr(trainer.data_collator, "tokenizer", None)
    if processor is not None:
        processor.save_pretrained(folder)
    torch.save(trainer.args, folder / ARGUMENTS)


def copy_adapter(checkpoint: Path, output: Path) -> None:
    """Copy the adapter of a checkpoint to the folder whose content transformers uploads while it trains."""
    for name in (WEIGHTS, CONFIG, LLAVA_CONFIG, CARD, PEFT_CONFIG):
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, output / name)
