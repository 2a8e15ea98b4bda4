"""Training: what changes in `llava.train.train` once it is imported. Without a tuning mode nothing does."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from wrapt import wrap_function_wrapper

from llava_steering_plugin.adapters.base_model import language_model, read_config
from llava_steering_plugin.adapters.compatibility import misfits
from llava_steering_plugin.errors import ArgumentsError, SteeringError, listing
from llava_steering_plugin.training import flags as arguments
from llava_steering_plugin.training.trainer import COMMAND_LINE, SteeringTrainerMixin
from llava_steering_plugin.upstream.seams import require


def on_train_import(module: ModuleType) -> None:
    """Adds the flags, the check of the command line, the trainer and the saving of adapters."""
    original = require(module, "LLaVATrainer")
    ours: dict[str, Any] = module.__dict__
    ours["LLaVATrainer"] = type(
        original.__name__, (SteeringTrainerMixin, original), {"__module__": original.__module__}
    )
    ours["TrainingArguments"] = arguments.extended(require(module, "TrainingArguments"))
    require(module, "safe_save_model_for_hf_trainer")
    wrap_function_wrapper(module, "safe_save_model_for_hf_trainer", _save)
    require(module, "train")
    wrap_function_wrapper(module, "train", _checked(module))


def _save(original: Callable[..., Any], instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    trainer = args[0] if args else kwargs["trainer"]
    if not arguments.active(trainer.args):
        return original(*args, **kwargs)
    return trainer.save_model(args[1] if len(args) > 1 else kwargs["output_dir"])


def _checked(module: ModuleType) -> Callable[..., Any]:
    def train(original: Callable[..., Any], instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flags, unknown = arguments.read_command_line(module, sys.argv[1:])
        if problems := _problems_in(flags, unknown):
            error = ArgumentsError(listing(arguments.CANNOT_START, problems))
            arguments.fail(error, every_rank=False)
        token = COMMAND_LINE.set(flags)
        try:
            return original(*args, **kwargs)
        except SteeringError as error:
            arguments.fail(error, every_rank=True)
        finally:
            COMMAND_LINE.reset(token)

    return train


def _problems_in(flags: Namespace, unknown: Sequence[str]) -> list[str]:
    """Everything that is wrong, as far as command line, base and machine tell it before a model is loaded."""
    problems = arguments.problems_in(flags, unknown)
    return [*problems, *_misfits(flags), *_data_parallel(flags)] if arguments.active(flags) else problems


def _misfits(flags: Namespace) -> list[str]:
    """Settings that are too much for a base in a folder; one of the hub, which may have to be fetched, comes later."""
    base = flags.model_name_or_path
    if not os.path.isdir(base or ""):
        return []
    try:
        return [
            f"--{problem}" for problem in misfits(language_model(read_config(base), base), arguments.mode_from(flags))
        ]
    except SteeringError:
        return []  # what is wrong is said already, or by whoever loads the base


def _data_parallel(flags: Namespace) -> list[str]:
    """What transformers does with several GPUs and no launcher."""
    launched = "LOCAL_RANK" in os.environ or flags.local_rank != -1 or flags.deepspeed
    count = 0 if launched or arguments.cpu_flag(flags) else torch.cuda.device_count()
    return [arguments.DATA_PARALLEL.format(count)] if count > 1 else []
